"""The keyboard controller as far as Linux needs it without one: its reset line.

Reading 0x64 gives "input buffer empty, nothing to read", so `reboot=k` need not wait and no driver
finds a keyboard. Command 0xFE pulses the processor's reset (arch/x86/kernel/reboot.c).
"""

from __future__ import annotations

from collections.abc import Callable

COMMAND_OFFSET = 4  # port 0x64, from 0x60
PULSE_RESET = 0xFE


class I8042:
    """`on_reset` is called by the vCPU that asked."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == COMMAND_OFFSET and size == 1 and value == PULSE_RESET:
            self._on_reset()
