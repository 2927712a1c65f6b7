"""API keys: whose they are, what they may do, until when; one transaction each.

Nothing is cached, here or in the workers: every request asks for its key, so a key that is revoked
or changed is so for the next request to any of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from vmcell_api.store.records import Team, Transaction, now_ms, team_of
from vmcell_api.store.tables import ApiKeyRow, TeamRow
from vmcell_protos.errors import CallerError

MAX_NAME_LENGTH = 64
# How exactly the time of the last use is kept: a write for every request would be dear.
LAST_USED_STEP_MS = 60_000


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key without the key; times are unix milliseconds, None: never."""

    key_id: str
    team: Team
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created_at_unix_ms: int
    expires_at_unix_ms: int | None
    revoked_at_unix_ms: int | None
    last_used_at_unix_ms: int | None

    def state(self, at_unix_ms: int) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at_unix_ms is not None:
            return "revoked"
        if self.expires_at_unix_ms is not None and self.expires_at_unix_ms <= at_unix_ms:
            return "expired"
        return "active"


class ApiKeys:
    """The keys of a store; `engine` stays the caller's. Methods raise HostError as Store's do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(
        self,
        team_id: str,
        key_hash: str,
        *,
        scopes: Sequence[str],
        name: str = "",
        prefix: str = "",
        expires_at_unix_ms: int | None = None,
    ) -> ApiKey:
        """Gives a team one more key; CallerError for a bad name, not_found for no such team."""
        if len(name) > MAX_NAME_LENGTH or not (name.isprintable() or not name):
            raise CallerError(f"name takes up to {MAX_NAME_LENGTH} printable characters")
        with Transaction(self._engine) as session:
            team = session.get(TeamRow, team_id)
            if team is None:
                raise CallerError(f"team {team_id[:64]!r} was not found", code="not_found")
            row = ApiKeyRow(
                hash=key_hash,
                id=f"k{secrets.token_hex(6)}",
                team_id=team_id,
                name=name,
                prefix=prefix,
                scopes=" ".join(scopes),
                created_at_unix_ms=now_ms(),
                expires_at_unix_ms=expires_at_unix_ms,
            )
            session.add(row)
            return _key(row, team)

    def find(self, key_hash: str) -> ApiKey | None:
        """The key with that hash, whatever its state."""
        query = sa.select(ApiKeyRow, TeamRow).join(TeamRow).where(ApiKeyRow.hash == key_hash)
        with Transaction(self._engine) as session:
            found = session.execute(query).first()
            return _key(*found) if found else None

    def get(self, key_id: str) -> ApiKey:
        """The key of that id; CallerError not_found."""
        with Transaction(self._engine) as session:
            return _key(*_found(session, key_id))

    def list(self, team_id: str | None = None) -> list[ApiKey]:
        """The keys of a team or of all, oldest first."""
        query = sa.select(ApiKeyRow, TeamRow).join(TeamRow)
        if team_id is not None:
            query = query.where(ApiKeyRow.team_id == team_id)
        query = query.order_by(TeamRow.name, ApiKeyRow.created_at_unix_ms, ApiKeyRow.id)
        with Transaction(self._engine) as session:
            return [_key(*found) for found in session.execute(query)]

    def touch(self, key_id: str) -> None:
        """Notes that the key is in use."""
        with Transaction(self._engine) as session:
            session.execute(
                sa.update(ApiKeyRow)
                .where(ApiKeyRow.id == key_id)
                .values(last_used_at_unix_ms=now_ms())
            )

    def replace(self, key_id: str, new_hash: str, *, prefix: str, grace_ms: int) -> ApiKey:
        """A new key that may do what the old one may, which ends in `grace_ms` at the latest.

        Both in one transaction. CallerError: not_found; failed_precondition for one that has ended.
        """
        with Transaction(self._engine) as session:
            # Locks the row (SQLite: the store), so that of two rotations one finds the key ended.
            session.execute(
                sa.update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(name=ApiKeyRow.name)
            )
            old, team = _found(session, key_id)
            moment = now_ms()
            state = _key(old, team).state(moment)
            if state != "active":
                raise CallerError(f"key {key_id} is {state}", code="failed_precondition")
            row = ApiKeyRow(
                hash=new_hash,
                id=f"k{secrets.token_hex(6)}",
                team_id=old.team_id,
                name=old.name,
                prefix=prefix,
                scopes=old.scopes,
                created_at_unix_ms=moment,
                expires_at_unix_ms=old.expires_at_unix_ms,
            )
            session.add(row)
            end = moment + grace_ms
            old.expires_at_unix_ms = min(end, old.expires_at_unix_ms or end)
            return _key(row, team)

    def revoke(self, key_id: str) -> ApiKey:
        """Ends a key for good, at once; doing so again changes nothing. CallerError not_found."""
        with Transaction(self._engine) as session:
            row, team = _found(session, key_id)
            row.revoked_at_unix_ms = row.revoked_at_unix_ms or now_ms()
            return _key(row, team)


def _found(session: Session, key_id: str) -> tuple[ApiKeyRow, TeamRow]:
    query = sa.select(ApiKeyRow, TeamRow).join(TeamRow).where(ApiKeyRow.id == key_id)
    found = session.execute(query).first()
    if found is None:
        raise CallerError(
            f"key {key_id[:40]!r} was not found; see: vmcell key list", code="not_found"
        )
    row, team = found
    return row, team


def _key(row: ApiKeyRow, team: TeamRow) -> ApiKey:
    return ApiKey(
        key_id=row.id,
        team=team_of(team),
        name=row.name,
        prefix=row.prefix,
        scopes=tuple(row.scopes.split()),
        created_at_unix_ms=row.created_at_unix_ms,
        expires_at_unix_ms=row.expires_at_unix_ms,
        revoked_at_unix_ms=row.revoked_at_unix_ms,
        last_used_at_unix_ms=row.last_used_at_unix_ms,
    )
