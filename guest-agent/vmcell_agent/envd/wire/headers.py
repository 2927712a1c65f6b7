"""Values of HTTP headers: Basic credentials, Connect's timeout, dates, ranges, file names."""

from __future__ import annotations

import binascii
import calendar
import re
import time
from typing import NamedTuple

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_IMF_DATE = re.compile(
    r"[A-Z][a-z]{2}, (\d{2}) ([A-Z][a-z]{2}) (\d{4}) (\d{2}):(\d{2}):(\d{2}) GMT", re.ASCII
)
_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII | re.IGNORECASE)

# Shown inline by browsers; everything else is a download.
_CONTENT_TYPES = {
    "css": "text/css; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "gif": "image/gif",
    "htm": "text/html; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "md": "text/plain; charset=utf-8",
    "mp4": "video/mp4",
    "pdf": "application/pdf",
    "png": "image/png",
    "py": "text/plain; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "wasm": "application/wasm",
    "webp": "image/webp",
    "xml": "text/xml; charset=utf-8",
}


class ByteRange(NamedTuple):
    """Bytes `start` to `end`, the end not included."""

    start: int
    end: int


class RangeNotSatisfiable(ValueError):
    """The range lies behind the end of the file: status 416."""


def basic_user(authorization: str | None) -> str | None:
    """The user name of `Basic base64(user:password)`, None when there is none.

    The password is not looked at: the access token is what authorises, the name only says whose
    rights to use. Raises ValueError when Basic credentials cannot be decoded.
    """
    if authorization is None:
        return None
    scheme, _, encoded = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = binascii.a2b_base64(encoded.strip(), strict_mode=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("Basic credentials are no base64 of UTF-8 text") from None
    user, colon, _ = decoded.partition(":")
    if not colon:
        raise ValueError("Basic credentials have no colon")
    return user or None


def timeout_seconds(connect_timeout_ms: str | None) -> float | None:
    """`Connect-Timeout-Ms`: at most ten digits; 0 and absence mean no limit; else ValueError."""
    if connect_timeout_ms is None:
        return None
    if not (connect_timeout_ms.isascii() and connect_timeout_ms.isdigit()):
        raise ValueError(f"Connect-Timeout-Ms {connect_timeout_ms!r} is no whole number")
    if len(connect_timeout_ms) > 10:
        raise ValueError(f"Connect-Timeout-Ms {connect_timeout_ms!r} has more than ten digits")
    return int(connect_timeout_ms) / 1000 or None


class NotAcceptable(ValueError):
    """The client takes neither gzip nor the bytes as they are: status 406."""


def wants_gzip(accept_encoding: str | None) -> bool:
    """Whether to pack a file for this client (RFC 9110 section 12.5.3); NotAcceptable.

    Only for one that names gzip and no other coding, or refuses plain bytes: clients whose HTTP
    library lists gzip among many get plain bytes, as inside a sandbox the processor is dearer than
    the local network.
    """
    weights: dict[str, float] = {}
    for item in (accept_encoding or "").lower().split(","):
        name, _, parameters = item.partition(";")
        if name.strip():
            weights[name.strip()] = _quality(parameters)
    any_other = weights.get("*")
    gzip = weights.get("gzip", any_other or 0.0) > 0
    plain = weights.get("identity", 1.0 if any_other is None else any_other) > 0
    if not gzip and not plain:
        raise NotAcceptable(f"Accept-Encoding {accept_encoding!r} allows neither gzip nor identity")
    return gzip and (not plain or [n for n, q in weights.items() if q > 0] == ["gzip"])


def _quality(parameters: str) -> float:
    match = re.search(r"(?:^|;)\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*(?:;|$)", parameters)
    return float(match[1]) if match else 1.0


def http_date(unix_s: float) -> str:
    """`Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 section 5.6.7), whatever the locale."""
    t = time.gmtime(unix_s)
    return (
        f"{_DAYS[t.tm_wday]}, {t.tm_mday:02d} {_MONTHS[t.tm_mon - 1]} {t.tm_year:04d} "
        f"{t.tm_hour:02d}:{t.tm_min:02d}:{t.tm_sec:02d} GMT"
    )


def parse_http_date(text: str | None) -> int | None:
    """Seconds since the epoch of an IMF-fixdate; None for anything else, which is then ignored."""
    match = _IMF_DATE.fullmatch(text.strip()) if text else None
    if match is None or match[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(match[n]) for n in (1, 3, 4, 5, 6))
    month = _MONTHS.index(match[2]) + 1
    if not (1 <= day <= 31 and year >= 1 and hour < 24 and minute < 60 and second <= 60):
        return None
    return calendar.timegm((year, month, day, hour, minute, second))


def parse_range(text: str | None, size_bytes: int) -> ByteRange | None:
    """One byte range of a file of `size_bytes`; None: send it whole (RFC 9110 section 14.2).

    Several ranges, other units and malformed texts are ignored, as a server may.
    Raises RangeNotSatisfiable.
    """
    match = _RANGE.fullmatch(text.strip()) if text else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size_bytes - int(match[2])), size_bytes
    else:
        start = int(match[1])
        end = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
        if match[2] and int(match[2]) < start:
            return None
    if start >= size_bytes or start >= end:
        raise RangeNotSatisfiable(f"range {text!r} is outside of {size_bytes} bytes")
    return ByteRange(start, end)


def content_type_of(name: str) -> str:
    extension = name.rpartition(".")[2].lower()
    return _CONTENT_TYPES.get(extension, "application/octet-stream")


def inline_disposition(name: str) -> str:
    """`inline; filename=...`: a token, a quoted string, or RFC 5987's form for other letters."""
    if re.fullmatch(r"[A-Za-z0-9!#$&+.^_`|~-]+", name):
        return f"inline; filename={name}"
    if name.isascii() and name.isprintable():
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        return f'inline; filename="{quoted}"'
    octets = name.encode("utf-8", "surrogateescape")
    safe = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
    encoded = "".join(chr(o) if o in safe else f"%{o:02X}" for o in octets)
    return f"inline; filename*=utf-8''{encoded}"
