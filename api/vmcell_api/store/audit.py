"""What was done, by whom, with which result; kept within an age and a number of rows.

Entries hold ids, never keys, tokens or bodies. Writers prune once in a while, so the bounds are
kept to within `PRUNE_EVERY` entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from vmcell_api.store.records import Transaction, now_ms
from vmcell_api.store.tables import AuditRow

PRUNE_EVERY = 200
MAX_ANSWER = 10_000
DAY_MS = 24 * 3600 * 1000
_LENGTHS = {"request_id": 32, "team_id": 36, "actor": 64, "action": 128, "target": 128}


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """`actor` is `key <id>` or `operator <user>`; `action` a command or a method with its route.

    `status` is the HTTP status, 0 for a command; `result` is "ok" or an error code.
    """

    at_unix_ms: int
    request_id: str = ""
    team_id: str = ""
    actor: str
    action: str
    target: str = ""
    status: int = 0
    result: str = "ok"


@dataclass(frozen=True, kw_only=True)
class AuditQuery:
    """Which entries, newest first; "" and None ask for any. `action` may be a part of one."""

    team_id: str = ""
    actor: str = ""
    action: str = ""
    target: str = ""
    result: str = ""
    since_unix_ms: int = 0
    failures_only: bool = False
    limit: int = 100


class Audit:
    """The entries of a store; `engine` stays the caller's. Methods raise HostError."""

    def __init__(self, engine: Engine, *, keep_days: int = 90, keep_rows: int = 100_000) -> None:
        self._engine = engine
        self._keep_days = keep_days
        self._keep_rows = keep_rows

    def add(self, entry: AuditEntry) -> None:
        """Writes one entry; texts are cut to their columns."""
        texts = {name: getattr(entry, name)[:length] for name, length in _LENGTHS.items()}
        row = AuditRow(
            **texts,
            at_unix_ms=entry.at_unix_ms,
            status=entry.status,
            result=entry.result[:32],
        )
        with Transaction(self._engine) as session:
            session.add(row)
            session.flush()
            if row.id % PRUNE_EVERY == 0:
                oldest_ms = now_ms() - self._keep_days * DAY_MS
                session.execute(
                    sa.delete(AuditRow).where(
                        sa.or_(
                            AuditRow.id <= row.id - self._keep_rows,
                            AuditRow.at_unix_ms < oldest_ms,
                        )
                    )
                )

    def find(self, query: AuditQuery) -> list[AuditEntry]:
        """The entries that match, newest first, at most 10,000."""
        statement = sa.select(AuditRow).where(AuditRow.at_unix_ms >= query.since_unix_ms)
        for name in ("team_id", "actor", "target", "result"):
            wanted = getattr(query, name)
            if wanted:
                statement = statement.where(getattr(AuditRow, name) == wanted)
        if query.action:
            statement = statement.where(AuditRow.action.contains(query.action, autoescape=True))
        if query.failures_only:
            statement = statement.where(AuditRow.result != "ok")
        statement = statement.order_by(AuditRow.id.desc()).limit(min(query.limit, MAX_ANSWER))
        with Transaction(self._engine) as session:
            return [_entry(row) for row in session.scalars(statement)]


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        at_unix_ms=row.at_unix_ms,
        request_id=row.request_id,
        team_id=row.team_id,
        actor=row.actor,
        action=row.action,
        target=row.target,
        status=row.status,
        result=row.result,
    )
