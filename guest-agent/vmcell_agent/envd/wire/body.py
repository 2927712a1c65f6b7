"""Where a request's body ends (RFC 9112 sections 6 and 7.1), for bodies that are read past h11.

`wanted` says how many bytes may be received at once, `take` hands on what of them is body. It is as
strict as h11: a proxy in front and this server must be of one mind where a body ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Protocol

_MAX_LINE_BYTES = 4096
_MAX_TRAILER_BYTES = 16 * 1024
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(;[\t\x20-\x7e\x80-\xff]*)?[ \t]*")
_TRAILER = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+:[\t\x20-\x7e\x80-\xff]*")


class BodyError(ValueError):
    """The bytes are no chunked body."""


class Body(Protocol):
    """`done` once all of it has been taken; `rest` is what came behind its end."""

    done: bool
    rest: bytes

    def wanted(self, limit_bytes: int) -> int: ...

    def take(self, data: memoryview) -> Iterator[memoryview]: ...


class StatedBody:
    """A body whose length the head states."""

    def __init__(self, length_bytes: int) -> None:
        self._left = length_bytes
        self.done = not length_bytes
        self.rest = b""

    def wanted(self, limit_bytes: int) -> int:
        return min(limit_bytes, self._left)

    def take(self, data: memoryview) -> Iterator[memoryview]:
        piece = data[: self._left]
        self._left -= len(piece)
        self.done = not self._left
        self.rest = bytes(data[len(piece) :])
        if piece:
            yield piece


class ChunkedBody:
    """A body in chunks; `take` raises BodyError, and takes everything for nothing after that."""

    def __init__(self) -> None:
        self._left = 0
        self._line = bytearray()
        self._trailer_bytes = 0
        self._on_line: Callable[[bytes], None] = self._size_line
        self._broken = False
        self.done = False
        self.rest = b""

    def wanted(self, limit_bytes: int) -> int:
        return limit_bytes

    def take(self, data: memoryview) -> Iterator[memoryview]:
        while data and not self._broken:
            if self.done:
                self.rest = bytes(data)
                return
            if self._left:
                piece = data[: self._left]
                self._left -= len(piece)
                data = data[len(piece) :]
                yield piece
            else:
                data = self._take_line(data)

    def _take_line(self, data: memoryview) -> memoryview:
        """Gather a line up to CRLF and act on it; what is behind it."""
        head = bytes(data[:_MAX_LINE_BYTES])
        before = len(self._line)
        self._line += head
        # The CR may have come with the piece before.
        end = self._line.find(b"\r\n", max(0, before - 1))
        if end < 0:
            if len(self._line) > _MAX_LINE_BYTES:
                self._break("a line of the chunked body is too long")
            return data[len(head) :]
        line = bytes(self._line[:end])
        self._line.clear()
        self._on_line(line)
        return data[end + 2 - before :]

    def _break(self, what: str) -> None:
        self._broken = True
        raise BodyError(what)

    def _size_line(self, line: bytes) -> None:
        match = _SIZE.fullmatch(line)
        if match is None:
            self._break("a chunk's size cannot be read")
            return
        self._left = int(match[1], 16)
        self._on_line = self._end_of_chunk if self._left else self._trailer_line

    def _end_of_chunk(self, line: bytes) -> None:
        if line:
            self._break("a chunk is longer than its size")
        self._on_line = self._size_line

    def _trailer_line(self, line: bytes) -> None:
        """Trailers mean nothing here, but must be some (section 7.1.2)."""
        self._trailer_bytes += len(line)
        if not line:
            self.done = True
        elif self._trailer_bytes > _MAX_TRAILER_BYTES or not _TRAILER.fullmatch(line):
            self._break("a trailer of the chunked body cannot be read")
