"""What a sandbox used at one moment, as envd's `GET /metrics` says it; pure.

Samples are kept as records of fixed length, so a history is a file that is appended to.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from vmcell_protos.errors import GuestError

_RECORD = struct.Struct("<qIdQQQQQ")
RECORD_BYTES = _RECORD.size
_MAX_COUNT = 1 << 63


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSample:
    """`cpu_used_pct` is that of all processors since the sample before."""

    unix_ms: int
    cpu_count: int
    cpu_used_pct: float
    mem_used_bytes: int
    mem_total_bytes: int
    mem_cache_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int

    def pack(self) -> bytes:
        """RECORD_BYTES bytes, which `unpack` reads back."""
        return _RECORD.pack(*astuple(self))


def unpack(record: bytes) -> MetricSample:
    """The sample in RECORD_BYTES bytes."""
    values = _RECORD.unpack(record)
    return MetricSample(**dict(zip(MetricSample.__slots__, values, strict=True)))


def parse_envd_metrics(body: bytes, unix_ms: int) -> MetricSample:
    """The sample in the answer of a guest, which is no friend; raises GuestError."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise GuestError(f"envd's /metrics answered no JSON: {body[:40]!r}") from error
    if not isinstance(told, dict):
        raise GuestError(f"envd's /metrics answered {body[:40]!r}; it takes an object")
    cpu_used_pct = told.get("cpu_used_pct")
    if isinstance(cpu_used_pct, bool) or not isinstance(cpu_used_pct, int | float):
        raise GuestError("envd's /metrics has no number cpu_used_pct")
    if not 0 <= cpu_used_pct < 1e6 or not math.isfinite(cpu_used_pct):
        raise GuestError("envd's /metrics has a cpu_used_pct out of bounds")
    return MetricSample(
        unix_ms=unix_ms,
        cpu_count=_count(told, "cpu_count", 1 << 16),
        cpu_used_pct=float(cpu_used_pct),
        mem_used_bytes=_count(told, "mem_used"),
        mem_total_bytes=_count(told, "mem_total"),
        mem_cache_bytes=_count(told, "mem_cache"),
        disk_used_bytes=_count(told, "disk_used"),
        disk_total_bytes=_count(told, "disk_total"),
    )


def _count(told: dict[str, object], name: str, limit: int = _MAX_COUNT) -> int:
    value = told.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise GuestError(f"envd's /metrics has no whole number {name} in bounds")
    return value


def thinned(records: Sequence[bytes]) -> list[bytes]:
    """Three quarters of the records: of the older half every second one goes.

    So a history of bounded length covers a sandbox's whole life, its last part in full.
    """
    middle = len(records) // 2
    return [*records[:middle:2], *records[middle:]]
