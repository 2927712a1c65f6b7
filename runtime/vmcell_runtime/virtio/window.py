"""A spare window: one whose device may come and go while the guest runs (virtio 1.2 § 4.2.2)."""

from __future__ import annotations

from vmcell_runtime.virtio.mmio import MmioTransport, read_empty


class SpareWindow:
    """What the bus has at a spare window; vCPU threads read `transport`, the loop's sets it.

    A vCPU may be inside a transport that has just been taken out: a closed one answers like an
    empty window and does nothing.
    """

    def __init__(self) -> None:
        self.transport: MmioTransport | None = None

    def read(self, offset: int, size: int) -> int:
        transport = self.transport
        return transport.read(offset, size) if transport is not None else read_empty(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        transport = self.transport
        if transport is not None:
            transport.write(offset, size, value)
