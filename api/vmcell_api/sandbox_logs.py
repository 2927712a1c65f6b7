"""What envd logged in a sandbox, as E2B's two log routes answer it; pure.

envd keeps the newest entries of its own life in memory, so logs end with the sandbox. The answer of
a guest is checked entry by entry: an entry of another form is left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from vmcell_api.query_numbers import query_number
from vmcell_api.sandbox_answers import rfc3339
from vmcell_protos.errors import CallerError, GuestError

LEVELS = ("debug", "info", "warn", "error")
MOST_ENTRIES = 1000
MAX_SEARCH_LENGTH = 256
LOGGER = "envd"
LATEST_MS = 1 << 53
# The end of the year 9999, beyond which a moment has no RFC 3339 form.
_LAST_TIMESTAMP_MS = 253402300799999


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One entry; `fields` are strings that depend on the event."""

    unix_ms: int
    level: str
    message: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LogQuery:
    """Which entries: from `cursor_ms` on, or backward from it; `level` is the lowest wanted."""

    cursor_ms: int = 0
    limit: int = MOST_ENTRIES
    backward: bool = False
    level: str = "debug"
    search: str = ""


def parse_entries(body: bytes) -> list[LogEntry]:
    """The entries in the answer of a guest, oldest first; raises GuestError."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise GuestError("envd's /logs answered no JSON") from error
    rows = told.get("entries") if isinstance(told, dict) else None
    if not isinstance(rows, list):
        raise GuestError("envd's /logs answered no list of entries")
    found = [entry for row in rows[-MOST_ENTRIES:] if (entry := _entry(row)) is not None]
    return sorted(found, key=lambda entry: entry.unix_ms)


def _entry(row: object) -> LogEntry | None:
    """None for what is no entry."""
    if not isinstance(row, dict):
        return None
    unix_ms, level, message = row.get("unix_ms"), row.get("level"), row.get("message")
    fields = row.get("fields", {})
    if isinstance(unix_ms, bool) or not isinstance(unix_ms, int):
        return None
    if not 0 <= unix_ms <= _LAST_TIMESTAMP_MS or level not in LEVELS:
        return None
    if not isinstance(message, str) or not isinstance(fields, dict):
        return None
    texts = {key: value for key, value in fields.items() if isinstance(value, str)}
    return LogEntry(unix_ms=unix_ms, level=str(level), message=message, fields=texts)


def parse_log_query(query_string: str, *, version: int) -> LogQuery:
    """The query of `GET …/logs`: `start` and `limit` in version 1; raises CallerError."""
    query = dict(parse_qsl(query_string, keep_blank_values=True))
    limit = _number(query, "limit", MOST_ENTRIES, range(1, MOST_ENTRIES + 1))
    if version == 1:
        start_ms = _number(query, "start", 0, range(LATEST_MS))
        return LogQuery(cursor_ms=start_ms, limit=limit)
    direction = query.get("direction") or "forward"
    if direction not in ("forward", "backward"):
        raise CallerError(f"direction is {direction[:40]!r}; it takes forward or backward")
    level = (query.get("level") or "debug").lower()
    if level not in LEVELS:
        raise CallerError(f"level is {level[:40]!r}; it takes one of {', '.join(LEVELS)}")
    search = query.get("search", "")
    if len(search) > MAX_SEARCH_LENGTH:
        raise CallerError(f"search has {len(search)} characters; at most {MAX_SEARCH_LENGTH}")
    backward = direction == "backward"
    cursor_ms = _number(query, "cursor", LATEST_MS if backward else 0, range(LATEST_MS + 1))
    return LogQuery(cursor_ms=cursor_ms, limit=limit, backward=backward, level=level, search=search)


def _number(query: dict[str, str], name: str, default: int, bounds: range) -> int:
    text = query.get(name, "")
    return query_number(name, text, bounds) if text else default


def select(entries: Iterable[LogEntry], query: LogQuery) -> list[LogEntry]:
    """The entries that match, at most `limit` of them, in the query's direction.

    Both directions include the cursor's own millisecond.
    """
    lowest = LEVELS.index(query.level)
    matching = [
        entry
        for entry in entries
        if LEVELS.index(entry.level) >= lowest
        and query.search in entry.message
        and (
            entry.unix_ms <= query.cursor_ms if query.backward else entry.unix_ms >= query.cursor_ms
        )
    ]
    if query.backward:
        matching.reverse()
    return matching[: query.limit]


def entry_answer(entry: LogEntry) -> dict[str, object]:
    """E2B's SandboxLogEntry."""
    return {
        "timestamp": rfc3339(entry.unix_ms),
        "message": entry.message,
        "level": entry.level,
        "fields": {**entry.fields, "logger": LOGGER},
    }


def first_answer(entries: Sequence[LogEntry]) -> dict[str, object]:
    """The body of version 1: every entry as a line of JSON, and again with its fields."""
    lines = [
        {
            "timestamp": rfc3339(entry.unix_ms),
            "line": json.dumps(
                {
                    **entry.fields,
                    "level": entry.level,
                    "logger": LOGGER,
                    "message": entry.message,
                }
            ),
        }
        for entry in entries
    ]
    return {"logs": lines, "logEntries": [entry_answer(entry) for entry in entries]}
