"""gzip (RFC 1952) as clients send it: one whole member, unpacked in bounded pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

GZIP_WINDOW_BITS = 31
_PIECE_BYTES = 256 * 1024


class CompressionError(ValueError):
    """The bytes are no gzip member, or end too early."""


class TooLarge(CompressionError):
    """They unpack to more than is allowed."""


class Gunzip:
    """Packed chunks in, pieces of at most 256 KiB out; both methods raise CompressionError."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(GZIP_WINDOW_BITS)

    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes]:
        while chunk:
            try:
                piece = self._stream.decompress(chunk, _PIECE_BYTES)
            except zlib.error as error:
                raise CompressionError(f"cannot unpack the gzip body: {error}") from None
            if piece:
                yield piece
            chunk = self._stream.unconsumed_tail

    def finish(self) -> None:
        if not self._stream.eof:
            raise CompressionError("cannot unpack the gzip body: it ends too early")


def unpack(packed: bytes, limit_bytes: int) -> bytes:
    """One member as a whole; CompressionError, TooLarge when it holds over `limit_bytes`."""
    unpacker = Gunzip()
    whole = bytearray()
    for piece in unpacker.feed(packed):
        whole += piece
        if len(whole) > limit_bytes:
            raise TooLarge(
                f"message size is larger than the limit of {limit_bytes} bytes once unpacked"
            )
    unpacker.finish()
    return bytes(whole)
