"""The lines of an answer to `/execute`: one JSON object each, and their bytes. No I/O.

Source: E2B's code interpreter; the clients fail on a line without the fields named here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Line = Mapping[str, Any]

KEEPALIVE: Line = {"type": "keepalive"}
END: Line = {"type": "end_of_execution"}


def executions(count: int) -> Line:
    """How many runs the context has had, this one included."""
    return {"type": "number_of_executions", "execution_count": count}


def output(stream: str, text: str, timestamp: str) -> Line:
    """A piece of "stdout" or "stderr"; `timestamp` is ISO 8601."""
    return {"type": stream, "text": text, "timestamp": timestamp}


def error(name: str, value: str, traceback: str) -> Line:
    """What the code raised, or why a run ended before its code did."""
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def encode(line: Line) -> bytes:
    """The line as bytes, newline included.

    ASCII only: Python's client splits lines wherever str.splitlines does, U+2028 included. Numbers
    that JSON has not (NaN, infinities) become null.
    """
    try:
        text = json.dumps(line, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(line), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
