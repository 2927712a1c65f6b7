"""Tenants and their limits, as the operator sees and changes them; one transaction each."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from vmcell_api.store.records import DEFAULT_SANDBOX_LIMIT, Team, Transaction, now_ms, team_of
from vmcell_api.store.tables import ApiKeyRow, SandboxRow, TeamRow
from vmcell_protos.errors import CallerError

TEAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a limit may be; the highest fits an integer of every database.
LIMITS = {
    "sandbox_limit": range(1_000_001),
    "max_timeout_s": range(1, 400 * 24 * 3600 + 1),
    "requests_per_s": range(1, 100_001),
}


@dataclass(frozen=True, kw_only=True)
class TeamSummary:
    """A team with what it has: keys that are not revoked, and sandboxes in the store's books."""

    team: Team
    created_at_unix_ms: int
    key_count: int
    sandbox_count: int


class Teams:
    """The teams of a store; `engine` stays the caller's. Methods raise HostError as Store's do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, name: str, limits: dict[str, int | None]) -> Team:
        """A new team; CallerError for a bad name or limit, already_exists for a taken name."""
        check_team_name(name)
        _check_limits(limits)
        with Transaction(self._engine) as session:
            if session.scalar(sa.select(TeamRow.id).where(TeamRow.name == name)):
                raise CallerError(
                    f"team {name!r} is there already; change it with: vmcell team limits {name}",
                    code="already_exists",
                )
            row = TeamRow(
                id=str(uuid.uuid4()),
                name=name,
                sandbox_limit=DEFAULT_SANDBOX_LIMIT,
                created_at_unix_ms=now_ms(),
            )
            for limit, value in limits.items():
                setattr(row, limit, value)
            session.add(row)
            return team_of(row)

    def find(self, name_or_id: str) -> Team:
        """The team of that name or id; CallerError not_found."""
        query = sa.select(TeamRow).where(
            sa.or_(TeamRow.name == name_or_id, TeamRow.id == name_or_id)
        )
        with Transaction(self._engine) as session:
            row = session.scalar(query)
            if row is None:
                raise CallerError(
                    f"team {name_or_id[:64]!r} was not found; see: vmcell team list",
                    code="not_found",
                )
            return team_of(row)

    def list(self) -> list[TeamSummary]:
        """All teams by name."""
        keys = _count(ApiKeyRow, ApiKeyRow.revoked_at_unix_ms.is_(None))
        query = sa.select(TeamRow, keys, _count(SandboxRow)).order_by(TeamRow.name)
        with Transaction(self._engine) as session:
            return [
                TeamSummary(
                    team=team_of(row),
                    created_at_unix_ms=row.created_at_unix_ms,
                    key_count=key_count,
                    sandbox_count=sandbox_count,
                )
                for row, key_count, sandbox_count in session.execute(query)
            ]

    def change_limits(self, team_id: str, limits: dict[str, int | None]) -> Team:
        """The team with these limits changed; CallerError for a bad one, not_found."""
        _check_limits(limits)
        with Transaction(self._engine) as session:
            row = session.get(TeamRow, team_id)
            if row is None:
                raise CallerError(f"team {team_id[:64]!r} was not found", code="not_found")
            for limit, value in limits.items():
                setattr(row, limit, value)
            return team_of(row)

    def remove(self, team_id: str) -> None:
        """Deletes a team with its keys; failed_precondition while something else is its own."""
        with Transaction(self._engine) as session:
            session.execute(sa.delete(ApiKeyRow).where(ApiKeyRow.team_id == team_id))
            try:
                session.execute(sa.delete(TeamRow).where(TeamRow.id == team_id))
            except sa.exc.IntegrityError as error:
                session.rollback()
                raise CallerError(
                    "the team still owns something in the store (sandboxes, templates, "
                    "volumes or snapshots); remove that first",
                    code="failed_precondition",
                ) from error


def check_team_name(name: str) -> None:
    """Raises CallerError unless `name` may be a team's."""
    if not TEAM_NAME.fullmatch(name):
        raise CallerError(
            f"{name[:80]!r} is no team name; use up to 64 letters, digits, dots and dashes"
        )


def _check_limits(limits: dict[str, int | None]) -> None:
    for name, value in limits.items():
        bounds = LIMITS[name]
        if value is None and name != "sandbox_limit":
            continue
        if value not in bounds:
            raise CallerError(f"{name} is {value}; it takes {bounds[0]} to {bounds[-1]}")


def _count(
    table: type[ApiKeyRow] | type[SandboxRow], *conditions: sa.ColumnElement[bool]
) -> sa.ScalarSelect[int]:
    query = sa.select(sa.func.count()).select_from(table)
    return query.where(table.team_id == TeamRow.id, *conditions).scalar_subquery()
