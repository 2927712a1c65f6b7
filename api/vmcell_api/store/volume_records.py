"""The store's questions about volumes; each method is one transaction, as in `records`.

A row is written before its directory is made and says `made` afterwards: what a crash leaves in
between is shown to nobody, and is taken up again by the next create of that name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from vmcell_api.store.records import Store, Transaction, now_ms
from vmcell_api.store.tables import TeamRow, VolumeRow
from vmcell_protos.errors import CallerError


@dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """A volume of a team."""

    volume_id: str
    team_id: str
    name: str
    created_at_unix_ms: int


class VolumeStore:
    """Borrows a store; thread-safe. Every method raises HostError as the store's own do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, volume_id: str, *, team_id: str, name: str, limit: int) -> VolumeRecord:
        """Writes the row of a volume that is about to be made, or finds one that never was.

        Raises CallerError: invalid_argument for a name the team has, resource_exhausted at `limit`.
        """
        with Transaction(self._store.engine) as session:
            # Locks the team's row (SQLite: the store), so that creates at once are counted apart.
            session.execute(
                sa.update(TeamRow).where(TeamRow.id == team_id).values(name=TeamRow.name)
            )
            rows = session.scalars(sa.select(VolumeRow).where(VolumeRow.team_id == team_id)).all()
            for row in rows:
                if row.name == name and row.made:
                    raise CallerError(f"Volume with name {name!r} already exists")
                if row.name == name:
                    return _record(row)
            if len(rows) >= limit:
                raise CallerError(
                    f"the team has {len(rows)} volumes of at most {limit}; delete one first",
                    code="resource_exhausted",
                )
            row = VolumeRow(
                id=volume_id,
                team_id=team_id,
                name=name,
                made=False,
                created_at_unix_ms=now_ms(),
            )
            session.add(row)
            return _record(row)

    def mark_made(self, volume_id: str) -> bool:
        """Says that the directory is there; False when the row has gone meanwhile."""
        with Transaction(self._store.engine) as session:
            change = sa.update(VolumeRow).where(VolumeRow.id == volume_id).values(made=True)
            return bool(session.execute(change.returning(VolumeRow.id)).all())

    def forget_unmade(self, volume_id: str) -> None:
        """Deletes the row of a create that failed, unless another one has finished it."""
        with Transaction(self._store.engine) as session:
            session.execute(
                sa.delete(VolumeRow).where(VolumeRow.id == volume_id, VolumeRow.made.is_(False))
            )

    def volume(self, volume_id: str, *, team_id: str) -> VolumeRecord | None:
        """A volume of that team."""
        found = self._made(team_id, VolumeRow.id == volume_id)
        return found[0] if found else None

    def volumes(self, *, team_id: str) -> list[VolumeRecord]:
        """The team's volumes, oldest first."""
        return self._made(team_id)

    def by_name(self, names: Collection[str], *, team_id: str) -> dict[str, VolumeRecord]:
        """The team's volumes of these names, as far as there are any."""
        found = self._made(team_id, VolumeRow.name.in_(names))
        return {record.name: record for record in found}

    def forget(self, volume_id: str) -> None:
        """Deletes the row; a missing one is fine."""
        with Transaction(self._store.engine) as session:
            session.execute(sa.delete(VolumeRow).where(VolumeRow.id == volume_id))

    def _made(self, team_id: str, *conditions: sa.ColumnElement[bool]) -> list[VolumeRecord]:
        query = (
            sa.select(VolumeRow)
            .where(VolumeRow.team_id == team_id, VolumeRow.made, *conditions)
            .order_by(VolumeRow.created_at_unix_ms, VolumeRow.id)
        )
        with Transaction(self._store.engine) as session:
            return [_record(row) for row in session.scalars(query)]


def _record(row: VolumeRow) -> VolumeRecord:
    return VolumeRecord(
        volume_id=row.id,
        team_id=row.team_id,
        name=row.name,
        created_at_unix_ms=row.created_at_unix_ms,
    )
