"""The questions the service asks its store; each method is one transaction.

Rows leave this module as frozen records. Tenants are kept apart here: what belongs to a team is
only answered to that team.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from vmcell_api.store.database import words_of
from vmcell_api.store.tables import SandboxRow, TeamRow, TemplateRow
from vmcell_protos.errors import CallerError, HostError

DEFAULT_SANDBOX_LIMIT = 100


@dataclass(frozen=True, kw_only=True)
class Team:
    """A tenant; a limit that is None is the service's."""

    team_id: str
    name: str
    sandbox_limit: int
    max_timeout_s: int | None = None
    requests_per_s: int | None = None


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a template's name stands for."""

    name: str
    image: str
    vcpus: int
    memory_mib: int
    default_user: str = ""
    default_workdir: str = ""
    start_command: str = ""
    ready_command: str = ""


@dataclass(frozen=True, kw_only=True)
class SandboxRecord:
    """What the store keeps of a sandbox; `access_token` "": envd asks for none.

    `traffic_token` "": everybody may send requests to its ports.
    """

    sandbox_id: str
    team_id: str
    template_id: str
    access_token: str = field(repr=False)
    metadata: dict[str, str]
    created_at_unix_ms: int
    traffic_token: str = field(default="", repr=False)


class Store:
    """Owns an engine; thread-safe, `close()` is idempotent.

    Every method raises HostError when the database does not answer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def engine(self) -> Engine:
        """For the other questions of this package; the store stays its owner."""
        return self._engine

    def close(self) -> None:
        """Closes the pool."""
        self._engine.dispose()

    def ensure_team(self, name: str) -> Team:
        """The team of that name, made if it is missing."""
        with self._transaction() as session:
            row = session.scalar(sa.select(TeamRow).where(TeamRow.name == name))
            if row is None:
                row = TeamRow(
                    id=str(uuid.uuid4()),
                    name=name,
                    sandbox_limit=DEFAULT_SANDBOX_LIMIT,
                    created_at_unix_ms=now_ms(),
                )
                session.add(row)
            return team_of(row)

    def template(self, name: str) -> Template | None:
        """The template of that name."""
        with self._transaction() as session:
            row = session.get(TemplateRow, name)
            return _template(row) if row else None

    def add_sandbox(self, record: SandboxRecord, *, limit: int, live: Collection[str]) -> None:
        """Writes the row of a sandbox that is about to be made.

        `live` are the ids that run on the node; rows of neither kind do not count against `limit`.
        Raises CallerError (resource_exhausted) when the team has reached it.
        """
        with self._transaction() as session:
            # Locks the team's row (SQLite: the store), so that creates at once are counted apart.
            session.execute(
                sa.update(TeamRow).where(TeamRow.id == record.team_id).values(name=TeamRow.name)
            )
            rows = session.execute(
                sa.select(SandboxRow.id, SandboxRow.built).where(
                    SandboxRow.team_id == record.team_id
                )
            ).all()
            count = sum(1 for sandbox_id, built in rows if not built or sandbox_id in live)
            if count >= limit:
                raise CallerError(
                    f"the team has {count} sandboxes of at most {limit}; kill one first",
                    code="resource_exhausted",
                )
            session.add(
                SandboxRow(
                    id=record.sandbox_id,
                    team_id=record.team_id,
                    template_id=record.template_id,
                    access_token=record.access_token,
                    traffic_token=record.traffic_token,
                    user_metadata=record.metadata,
                    built=False,
                    created_at_unix_ms=record.created_at_unix_ms,
                )
            )

    def mark_built(self, sandbox_id: str) -> None:
        """Says that the node has made the sandbox."""
        with self._transaction() as session:
            session.execute(
                sa.update(SandboxRow).where(SandboxRow.id == sandbox_id).values(built=True)
            )

    def sandbox(self, sandbox_id: str, *, team_id: str) -> SandboxRecord | None:
        """A sandbox of that team."""
        query = sa.select(SandboxRow).where(
            SandboxRow.id == sandbox_id, SandboxRow.team_id == team_id
        )
        with self._transaction() as session:
            row = session.scalar(query)
            return _sandbox(row) if row else None

    def sandboxes(self, *, team_id: str) -> dict[str, SandboxRecord]:
        """All rows of a team, by sandbox id."""
        query = sa.select(SandboxRow).where(SandboxRow.team_id == team_id)
        with self._transaction() as session:
            return {row.id: _sandbox(row) for row in session.scalars(query)}

    def tokens(self) -> dict[str, str]:
        """The envd tokens of all secured sandboxes, by sandbox id."""
        query = sa.select(SandboxRow.id, SandboxRow.access_token).where(
            SandboxRow.access_token != ""
        )
        with self._transaction() as session:
            return {sandbox_id: token for sandbox_id, token in session.execute(query)}

    def traffic_token(self, sandbox_id: str) -> str | None:
        """The token that requests to the sandbox's ports need, "" for none; None: no such row."""
        query = sa.select(SandboxRow.traffic_token).where(SandboxRow.id == sandbox_id)
        with self._transaction() as session:
            return session.scalar(query)

    def forget_sandboxes(self, sandbox_ids: Collection[str]) -> None:
        """Deletes rows; missing ones are fine."""
        with self._transaction() as session:
            session.execute(sa.delete(SandboxRow).where(SandboxRow.id.in_(sandbox_ids)))

    def templates(self) -> list[Template]:
        """The templates that every team may use, by name."""
        query = sa.select(TemplateRow).order_by(TemplateRow.name)
        with self._transaction() as session:
            return [_template(row) for row in session.scalars(query)]

    def _transaction(self) -> Transaction:
        return Transaction(self._engine)


class Transaction:
    """One session that commits at the end of the block and turns database errors into ours."""

    def __init__(self, engine: Engine) -> None:
        self._session = Session(engine, expire_on_commit=False)

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._session as session:
            try:
                if error is None:
                    session.commit()
            except sa.exc.SQLAlchemyError as failure:
                raise HostError(
                    f"the store did not take a change: {words_of(failure)}"
                ) from failure
        if isinstance(error, sa.exc.SQLAlchemyError):
            raise HostError(f"the store did not answer: {words_of(error)}") from error


def team_of(row: TeamRow) -> Team:
    """The record of a row."""
    return Team(
        team_id=row.id,
        name=row.name,
        sandbox_limit=row.sandbox_limit,
        max_timeout_s=row.max_timeout_s,
        requests_per_s=row.requests_per_s,
    )


def _template(row: TemplateRow) -> Template:
    return Template(name=row.name, image=row.image, vcpus=row.vcpus, memory_mib=row.memory_mib)


def _sandbox(row: SandboxRow) -> SandboxRecord:
    return SandboxRecord(
        sandbox_id=row.id,
        team_id=row.team_id,
        template_id=row.template_id,
        access_token=row.access_token,
        metadata=row.user_metadata,
        created_at_unix_ms=row.created_at_unix_ms,
        traffic_token=row.traffic_token,
    )


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000
