"""The store's questions about snapshots; each method is one transaction, as in `records`.

A row is written before the node is asked for the snapshot and says `made` afterwards. A name stands
for the newest snapshot that it was given to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from vmcell_api.store.records import Store, Transaction, now_ms
from vmcell_api.store.tables import SnapshotRow, TeamRow
from vmcell_protos.errors import CallerError


@dataclass(frozen=True, kw_only=True)
class TeamSnapshot:
    """A snapshot of a team; `name` "" when it has none. `secured`: its envd asks for a token."""

    snapshot_id: str
    team_id: str
    sandbox_id: str
    template_id: str
    name: str
    vcpus: int
    memory_mib: int
    secured: bool
    made: bool
    created_at_unix_ms: int


class SnapshotRows:
    """Borrows a store; thread-safe. Every method raises HostError as the store's own do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, row: TeamSnapshot, *, limit: int) -> None:
        """Writes a snapshot that is about to be made; CallerError resource_exhausted at `limit`."""
        with Transaction(self._store.engine) as session:
            # Locks the team's row (SQLite: the store), so that two at once are counted apart.
            session.execute(
                sa.update(TeamRow).where(TeamRow.id == row.team_id).values(name=TeamRow.name)
            )
            query = sa.select(sa.func.count()).where(SnapshotRow.team_id == row.team_id)
            count = session.scalar(query) or 0
            if count >= limit:
                raise CallerError(
                    f"the team has {count} snapshots of at most {limit}; delete one first",
                    code="resource_exhausted",
                )
            session.add(
                SnapshotRow(
                    id=row.snapshot_id,
                    team_id=row.team_id,
                    sandbox_id=row.sandbox_id,
                    template_id=row.template_id,
                    name="",
                    vcpus=row.vcpus,
                    memory_mib=row.memory_mib,
                    secured=row.secured,
                    made=False,
                    created_at_unix_ms=now_ms(),
                )
            )

    def mark_made(self, snapshot_id: str, *, team_id: str, name: str) -> None:
        """Says that the node has it; from now on it has the name that another may have had."""
        with Transaction(self._store.engine) as session:
            if name:
                session.execute(
                    sa.update(SnapshotRow)
                    .where(SnapshotRow.team_id == team_id, SnapshotRow.name == name)
                    .values(name="")
                )
            session.execute(
                sa.update(SnapshotRow)
                .where(SnapshotRow.id == snapshot_id)
                .values(made=True, name=name)
            )

    def snapshot(self, snapshot_id: str, *, team_id: str) -> TeamSnapshot | None:
        """A snapshot of that team that was made."""
        found = self._rows(SnapshotRow.id == snapshot_id, SnapshotRow.team_id == team_id)
        return found[0] if found and found[0].made else None

    def named(self, name: str, *, team_id: str) -> TeamSnapshot | None:
        """The team's snapshot of that name."""
        found = self._rows(SnapshotRow.name == name, SnapshotRow.team_id == team_id)
        return found[0] if found else None

    def of_team(self, team_id: str) -> list[TeamSnapshot]:
        """All rows of a team, newest first."""
        return self._rows(SnapshotRow.team_id == team_id)

    def forget(self, snapshot_ids: Collection[str]) -> None:
        """Deletes rows; missing ones are fine."""
        with Transaction(self._store.engine) as session:
            session.execute(sa.delete(SnapshotRow).where(SnapshotRow.id.in_(snapshot_ids)))

    def _rows(self, *conditions: sa.ColumnElement[bool]) -> list[TeamSnapshot]:
        query = (
            sa.select(SnapshotRow)
            .where(*conditions)
            .order_by(SnapshotRow.created_at_unix_ms.desc(), SnapshotRow.id.desc())
        )
        with Transaction(self._store.engine) as session:
            return [_record(row) for row in session.scalars(query)]


def _record(row: SnapshotRow) -> TeamSnapshot:
    return TeamSnapshot(
        snapshot_id=row.id,
        team_id=row.team_id,
        sandbox_id=row.sandbox_id,
        template_id=row.template_id,
        name=row.name,
        vcpus=row.vcpus,
        memory_mib=row.memory_mib,
        secured=row.secured,
        made=row.made,
        created_at_unix_ms=row.created_at_unix_ms,
    )
