"""Connect's frames on a stream: one flag byte, four bytes of length (big-endian), the payload.

Connect protocol, "Streaming RPCs": flag bit 0 marks a compressed payload, bit 1 the end-of-stream
message, which is the last one of a response and holds `{}` or `{"error": {...}}`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmcell_protos.errors import CallerError

from .fields import dump_message

FLAG_COMPRESSED = 0x01
FLAG_END_STREAM = 0x02

_PREFIX = struct.Struct(">BI")


class Envelope(NamedTuple):
    """One frame as it came: the flag byte and the payload."""

    flags: int
    payload: bytes


def encode_envelope(payload: bytes, flags: int = 0) -> bytes:
    return _PREFIX.pack(flags, len(payload)) + payload


def encode_end(code: str | None = None, message: str = "") -> bytes:
    """The end-of-stream frame; without `code` the stream ended well."""
    if code is None:
        return encode_envelope(b"{}", FLAG_END_STREAM)
    error: dict[str, object] = {"error": {"code": code, "message": message}}
    return encode_envelope(dump_message(error), FLAG_END_STREAM)


class EnvelopeDecoder:
    """Bytes in, frames out; holds at most one frame of `max_payload_bytes` and what was fed last.

    Raises CallerError resource_exhausted as soon as a prefix announces more than the limit.
    """

    def __init__(self, max_payload_bytes: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame; not 0 at the end of the body means it was cut short."""
        return len(self._buffer)

    def feed(self, chunk: bytes | memoryview) -> list[Envelope]:
        self._buffer += chunk
        frames: list[Envelope] = []
        start = 0
        while len(self._buffer) - start >= _PREFIX.size:
            flags, length = _PREFIX.unpack_from(self._buffer, start)
            if length > self._max_payload_bytes:
                raise CallerError(
                    f"message size {length} is larger than the limit of "
                    f"{self._max_payload_bytes} bytes",
                    code="resource_exhausted",
                )
            end = start + _PREFIX.size + length
            if len(self._buffer) < end:
                break
            frames.append(Envelope(flags, bytes(self._buffer[start + _PREFIX.size : end])))
            start = end
        del self._buffer[:start]
        return frames
