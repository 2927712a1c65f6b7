"""Guest memory that misbehaves: what was read once has changed when it is read again."""

from __future__ import annotations

from vmcell_runtime.memory import GuestMemory


class FlippingMemory(GuestMemory):
    """Once `flip` is set, a byte that was copied out before comes out inverted.

    Ring indices are read again and again by right, so words (`load16`, …) do not flip; everything
    else the device may look at once only (safety rule MS7).
    """

    def __init__(self, ram_bytes: int) -> None:
        super().__init__(ram_bytes)
        self.flip = False
        self.second_reads = 0
        self._seen: set[int] = set()

    def read(self, gpa: int, length: int) -> bytes:
        data = super().read(gpa, length)
        if not self.flip:
            return data
        addresses = range(gpa, gpa + length)
        if self._seen.isdisjoint(addresses):
            self._seen.update(addresses)
            return data
        self.second_reads += 1
        return bytes(
            byte ^ 0xFF if address in self._seen else byte
            for address, byte in zip(addresses, data, strict=True)
        )
