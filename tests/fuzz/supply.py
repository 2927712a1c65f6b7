"""Fuzzed bytes as a supply of choices, so that most inputs are mostly valid and go deep.

Reading beyond the end gives zeros: every input is a whole story. `Script` writes what `Supply`
reads, for seeds made by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Supply:
    """Reads little-endian numbers and bytes off the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def number(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def byte(self) -> int:
        return self.number(1)

    def pick(self, choices: Sequence[T]) -> T:
        """One of at most 256."""
        return choices[self.byte() % len(choices)]

    def take(self, count: int) -> bytes:
        """At most `count` bytes."""
        data = self._data[self._at : self._at + count]
        self._at += count
        return data

    def chunk(self, most: int) -> bytes:
        """Bytes of a length that the input says (two bytes)."""
        return self.take(self.number(2) % (most + 1))

    def rest(self) -> bytes:
        return self.take(max(0, len(self._data) - self._at))


class Script(bytearray):
    """The other way round; each method appends and returns the script."""

    def number(self, value: int, size: int) -> Script:
        self += value.to_bytes(size, "little")
        return self

    def bytes(self, *values: int) -> Script:
        self.extend(values)
        return self

    def chunk(self, data: bytes) -> Script:
        self += len(data).to_bytes(2, "little") + data
        return self
