"""multipart/form-data in bounded memory (RFC 7578, RFC 2046 section 5.1).

Bytes in, events out: a part begins, a piece of its body, it ends. A piece is handed on as soon as
it cannot be part of a delimiter, so a file of any size needs no more memory than one fed chunk.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .target import percent_decode

MAX_PART_HEADER_BYTES = 16 * 1024

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PARAMETER = re.compile(rf';\s*({_TOKEN})\s*=\s*(?:"((?:\\.|[^"\\])*)"|([^;\s]*))')
_QUOTED_PAIR = re.compile(r'\\(["\\])')


class MultipartError(ValueError):
    """The body is no well-formed multipart/form-data."""


class PartBegin(NamedTuple):
    """A part's headers: its form name and its file name with directories, None when it has none."""

    name: str
    filename: str | None


class PartData(NamedTuple):
    """A piece of the part that began last; never empty."""

    data: bytes | memoryview


class PartEnd(NamedTuple):
    """The part that began last is complete."""


PartEvent = PartBegin | PartData | PartEnd


def header_parameters(value: str) -> dict[str, str]:
    r"""`form-data; name="file"; filename="a\"b"` -> {"name": "file", "filename": 'a"b'}."""
    parameters: dict[str, str] = {}
    for match in _PARAMETER.finditer(value):
        quoted = match[2]
        text = match[3] if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
        parameters.setdefault(match[1].lower(), text)
    return parameters


def boundary_of(content_type: str) -> bytes:
    """The boundary of a `multipart/form-data; boundary=...` content type; MultipartError if bad."""
    boundary = header_parameters(content_type[len("multipart/form-data") :]).get("boundary", "")
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise MultipartError("the content type has no usable boundary")
    return boundary.encode("ascii")


def _parse_part_headers(block: bytes) -> PartBegin:
    try:
        lines = block.decode("utf-8").split("\r\n")
    except UnicodeDecodeError:
        raise MultipartError("a part's headers are no UTF-8") from None
    for line in lines:
        field, colon, value = line.partition(":")
        if not colon or field.strip().lower() != "content-disposition":
            continue
        parameters = header_parameters(value)
        filename = parameters.get("filename")
        extended = parameters.get("filename*")
        if extended is not None:
            # RFC 5987: charset'language'value.
            charset, _, encoded = extended.partition("'")
            if charset.lower() != "utf-8":
                raise MultipartError(f"a part's file name has the unknown charset {charset!r}")
            try:
                filename = percent_decode(encoded.partition("'")[2].encode("utf-8"))
            except ValueError:
                raise MultipartError("a part's filename* cannot be decoded") from None
        return PartBegin(parameters.get("name", ""), filename)
    raise MultipartError("a part has no Content-Disposition header")


class MultipartParser:
    """Feed chunks of the body in order, then `finish()`; both raise MultipartError."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter may stand at the very start of the body.
        self._buffer = bytearray(b"\r\n")
        self._state = self._preamble
        self._done = False

    def feed(self, chunk: bytes | memoryview) -> list[PartEvent]:
        if self._done:
            return []
        self._buffer += chunk
        events: list[PartEvent] = []
        while not self._done and self._state(events):
            pass
        return events

    def finish(self) -> None:
        if not self._done:
            raise MultipartError("the body ended before its last boundary")

    def _preamble(self, events: list[PartEvent]) -> bool:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            del self._buffer[: max(0, len(self._buffer) - len(self._delimiter) + 1)]
            return False
        del self._buffer[: at + len(self._delimiter)]
        self._state = self._after_delimiter
        return True

    def _after_delimiter(self, events: list[PartEvent]) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self._done = True
            self._buffer.clear()
            return False
        # Transport padding: blanks between the boundary and its line end.
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if self._buffer.strip(b" \t\r") or len(self._buffer) > MAX_PART_HEADER_BYTES:
                raise MultipartError("a boundary is followed by text")
            return False
        if self._buffer[:end].strip(b" \t"):
            raise MultipartError("a boundary is followed by text")
        # The line end stays: a part without headers has its blank line at once.
        del self._buffer[:end]
        self._state = self._headers
        return True

    def _headers(self, events: list[PartEvent]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end > MAX_PART_HEADER_BYTES or (end < 0 and len(self._buffer) > MAX_PART_HEADER_BYTES):
            raise MultipartError(f"a part's headers exceed {MAX_PART_HEADER_BYTES} bytes")
        if end < 0:
            return False
        events.append(_parse_part_headers(bytes(self._buffer[2:end])))
        # The second line end stays: an empty part is followed by its delimiter at once.
        del self._buffer[: end + 2]
        self._state = self._first_line_end
        return True

    def _first_line_end(self, events: list[PartEvent]) -> bool:
        if len(self._buffer) < len(self._delimiter):
            return False
        if not self._buffer.startswith(self._delimiter):
            del self._buffer[:2]
        self._state = self._body
        return True

    def _body(self, events: list[PartEvent]) -> bool:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            kept = len(self._delimiter) - 1
            if len(self._buffer) > kept:
                # Handed on as it is, with a new buffer for what may be a delimiter: no copy.
                full, self._buffer = self._buffer, self._buffer[-kept:]
                events.append(PartData(memoryview(full)[:-kept]))
            return False
        if at:
            events.append(PartData(bytes(self._buffer[:at])))
        events.append(PartEnd())
        del self._buffer[: at + len(self._delimiter)]
        self._state = self._after_delimiter
        return True
