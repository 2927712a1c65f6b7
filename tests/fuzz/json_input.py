"""JSON documents that are small as inputs and large, or deep, as the parser sees them.

The string "@300" stands for 300 bytes in hex, "@[900" for a list in a list … 900 deep: so that the
fuzzer plays with the document and not with its filling.
"""

from __future__ import annotations

import re

_FILLING = re.compile(rb'"@(\[?)(\d{1,5})"')
_MOST_BYTES = 70_000
# CPython's own limit, below which json takes what str() or a comparison may not.
_MOST_DEPTH = 1100


def expand(document: bytes) -> bytes:
    """The document with every filling in its place."""

    def fill(match: re.Match[bytes]) -> bytes:
        count = int(match[2])
        if match[1]:
            depth = min(count, _MOST_DEPTH)
            return b"[" * depth + b"]" * depth
        return b'"' + b"0a" * min(count, _MOST_BYTES) + b'"'

    return _FILLING.sub(fill, document)
