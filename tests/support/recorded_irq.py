"""The interrupt line that tests give a device."""

from __future__ import annotations


class RecordedIrq:
    """A line without KVM; `count` is how often it was fired."""

    def __init__(self) -> None:
        self.count = 0

    def fire(self) -> None:
        self.count += 1
