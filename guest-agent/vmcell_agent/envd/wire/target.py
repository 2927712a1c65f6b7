"""A request target's path and query, decoded once (RFC 3986 section 2.1, `url.ParseQuery`)."""

from __future__ import annotations

import re

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


def percent_decode(text: bytes, *, plus_is_space: bool = False) -> str:
    """Decode %XX; ValueError when the result is no UTF-8 or a % stands alone.

    What follows a `%` that is no hexadecimal pair is refused, as Go refuses it: a path that two
    readers understand differently is how checks are passed by.
    """
    if plus_is_space:
        text = text.replace(b"+", b" ")
    if text.count(b"%") != len(_ESCAPE.findall(text)):
        raise ValueError("invalid percent escape")
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), text).decode("utf-8")


def split_target(target: bytes) -> tuple[str, dict[str, str]]:
    """`/files?path=%2Fa` -> ("/files", {"path": "/a"}); the first of equal keys counts.

    Absolute targets (`http://host/path`) are understood as RFC 9112 section 3.2.2 asks.
    Raises ValueError on bad escapes.
    """
    if not target.startswith(b"/") and b"://" in target:
        _, _, rest = target.partition(b"://")
        _, slash, path = rest.partition(b"/")
        target = slash + path if slash else b"/"
    path_bytes, _, query_bytes = target.partition(b"?")
    query: dict[str, str] = {}
    for pair in query_bytes.split(b"&"):
        if not pair:
            continue
        key, _, value = pair.partition(b"=")
        query.setdefault(
            percent_decode(key, plus_is_space=True), percent_decode(value, plus_is_space=True)
        )
    return percent_decode(path_bytes), query
