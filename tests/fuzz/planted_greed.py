"""Parsers that take a length at its word, or their time: for the harness's own tests."""

from __future__ import annotations

import time

from fuzz_targets import SLOW_S

ALLOWED = (ValueError,)
REACHES = ()


def one(data: bytes) -> None:
    if data.startswith(b"slow"):
        until = time.thread_time() + SLOW_S + 0.1
        while time.thread_time() < until:
            pass
    elif data.startswith(b"big"):
        bytearray(b"x" * (256 << 20))
    elif data.startswith(b"bad"):
        raise ValueError("refused")


def seeds() -> dict[str, bytes]:
    return {}
