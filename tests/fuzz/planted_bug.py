"""A parser with a bug, for the harness's own test: the checksum of an empty list.

Faces nobody. A record is `LIST`, a count, so many bytes, and their mean must be below 200.
"""

from __future__ import annotations

ALLOWED = (ValueError,)
REACHES = ("planted_bug:parse",)


def parse(data: bytes) -> int:
    if data[:4] != b"LIST":
        raise ValueError("this is no list")
    if len(data) < 5:
        raise ValueError("it has no count")
    items = data[5 : 5 + data[4]]
    mean = sum(items) // len(items)  # the bug: a count of 0 is not refused
    if mean >= 200:
        raise ValueError("the items are too large")
    return mean


def one(data: bytes) -> None:
    parse(data)


def seeds() -> dict[str, bytes]:
    return {"three-items": b"LIST\x03abc"}
