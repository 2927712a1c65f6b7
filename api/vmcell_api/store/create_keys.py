"""Idempotency keys of creates: one key of a team stands for one body and one sandbox.

A key is written in the transaction that finds it free, so of two creates at once one goes on and
the other is told. Keys are forgotten after a day, as clients repeat within minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from vmcell_api.store.records import Store, Transaction, now_ms
from vmcell_api.store.tables import CreateKeyRow, TeamRow

KEPT_MS = 24 * 3600 * 1000


@dataclass(frozen=True, kw_only=True)
class CreateKey:
    """`fingerprint`: SHA-256 in hex of what the key was sent with; `done`: it was made."""

    team_id: str
    key: str
    fingerprint: str
    sandbox_id: str
    created_at_unix_ms: int
    done: bool = False


class CreateKeys:
    """The keys in `store`, which stays the caller's; thread-safe. Raises HostError as it does."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine

    def take(self, wanted: CreateKey) -> CreateKey | None:
        """Writes the key; answers the one that was there instead, None when the key was free."""
        with Transaction(self._engine) as session:
            # Locks the team's row (SQLite: the store): creates with one key come one by one.
            session.execute(
                sa.update(TeamRow).where(TeamRow.id == wanted.team_id).values(name=TeamRow.name)
            )
            session.execute(
                sa.delete(CreateKeyRow).where(CreateKeyRow.created_at_unix_ms < now_ms() - KEPT_MS)
            )
            row = session.get(CreateKeyRow, (wanted.team_id, wanted.key))
            if row is not None:
                return CreateKey(
                    team_id=row.team_id,
                    key=row.key,
                    fingerprint=row.fingerprint,
                    sandbox_id=row.sandbox_id,
                    created_at_unix_ms=row.created_at_unix_ms,
                    done=row.done,
                )
            session.add(
                CreateKeyRow(
                    team_id=wanted.team_id,
                    key=wanted.key,
                    fingerprint=wanted.fingerprint,
                    sandbox_id=wanted.sandbox_id,
                    created_at_unix_ms=wanted.created_at_unix_ms,
                    done=False,
                )
            )
            return None

    def mark_done(self, taken: CreateKey) -> None:
        """Says that the key's sandbox was made."""
        with Transaction(self._engine) as session:
            session.execute(sa.update(CreateKeyRow).where(*_is(taken)).values(done=True))

    def free(self, taken: CreateKey) -> None:
        """Forgets the key if it still stands for that sandbox: its create is known to be undone."""
        with Transaction(self._engine) as session:
            session.execute(sa.delete(CreateKeyRow).where(*_is(taken)))


def _is(taken: CreateKey) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        CreateKeyRow.team_id == taken.team_id,
        CreateKeyRow.key == taken.key,
        CreateKeyRow.sandbox_id == taken.sandbox_id,
    )
