"""Interrupt lines: what a device fires.

A line is an eventfd bound to a GSI by KVM_IRQFD; firing it is one write, from any thread, and needs
no KVM descriptor. Devices may share one: drivers ask their device if it was meant. All our
interrupts are edge-triggered, as the MP table says.
"""

from __future__ import annotations

import os
from typing import Protocol


class Interrupt(Protocol):
    """What a device needs of its interrupt."""

    def fire(self) -> None:
        """Raises one edge; several before the guest looks may merge into one."""


class IrqLine:
    """An interrupt line of the in-kernel irqchip; owns its eventfd. `close` is idempotent."""

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fire(self) -> None:
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
