"""Which snapshots a team has, by id and by name: what the store knows joined with the node's.

A row whose snapshot is gone from the node is dropped when it is met; one whose snapshot the node
has although nobody has said so (the API died meanwhile) counts as made.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence

from vmcell_api.node_channel import is_undone
from vmcell_api.node_client import NodeSnapshot, NodeVerbs, RunningSandbox
from vmcell_api.store.records import Store, Team, now_ms
from vmcell_api.store.snapshot_rows import SnapshotRows, TeamSnapshot
from vmcell_api.template_names import DEFAULT_TAG, namespace_of, parse_name
from vmcell_protos.errors import CallerError, VmcellError

# No save takes longer; a row that was not made by then belongs to nothing.
LOST_AFTER_MS = 600_000
_ALPHABET = string.ascii_lowercase + string.digits


class SnapshotCatalog:
    """The snapshots of one team at a time; thread-safe. `limit` is a team's number of them."""

    def __init__(self, store: Store, node: NodeVerbs, *, limit: int) -> None:
        self._rows = SnapshotRows(store)
        self._node = node
        self._limit = limit

    def make(self, team: Team, running: RunningSandbox, secured: bool, name: str) -> TeamSnapshot:
        """Makes a snapshot of a sandbox of the team; `name` is normal or ""."""
        row = TeamSnapshot(
            snapshot_id=new_snapshot_id(),
            team_id=team.team_id,
            sandbox_id=running.sandbox_id,
            template_id=running.template_id,
            name=name,
            vcpus=running.vcpus,
            memory_mib=running.memory_mib,
            secured=secured,
            made=True,
            created_at_unix_ms=now_ms(),
        )
        self._rows.add(row, limit=self._limit)
        try:
            self._node.make_snapshot(running.sandbox_id, row.snapshot_id)
        except VmcellError as error:
            if is_undone(error):
                self._rows.forget([row.snapshot_id])
            raise
        self._rows.mark_made(row.snapshot_id, team_id=team.team_id, name=name)
        return row

    def by_id(self, team: Team, text: str) -> TeamSnapshot | None:
        """The team's snapshot of that id."""
        return self._rows.snapshot(text, team_id=team.team_id) if len(text) <= 64 else None

    def by_name(self, team: Team, text: str) -> TeamSnapshot | None:
        """The team's snapshot of that name."""
        try:
            return self._rows.named(normal_name(team, text), team_id=team.team_id)
        except CallerError:
            return None

    def find(self, team: Team, text: str) -> TeamSnapshot | None:
        """By id or name."""
        return self.by_id(team, text) or self.by_name(team, text)

    def list(self, team: Team, *, sandbox_id: str = "", name: str = "") -> list[TeamSnapshot]:
        """The team's snapshots, newest first; of one sandbox or name when these are given."""
        present = {row.snapshot_id for row in self._node.snapshots()}
        rows = self._rows.of_team(team.team_id)
        newest_ms = now_ms() - LOST_AFTER_MS
        lost = [
            row.snapshot_id
            for row in rows
            if row.snapshot_id not in present and row.created_at_unix_ms < newest_ms
        ]
        if lost:
            self._rows.forget(lost)
        for row in rows:
            if not row.made and row.snapshot_id in present:
                self._rows.mark_made(row.snapshot_id, team_id=team.team_id, name="")
        wanted_name = normal_name(team, name) if name else ""
        return [
            row
            for row in rows
            if row.snapshot_id in present
            and sandbox_id in ("", row.sandbox_id)
            and wanted_name in ("", row.name)
        ]

    def of_sandbox(self, team: Team, sandbox_id: str) -> Sequence[tuple[NodeSnapshot, str]]:
        """What the node has of a sandbox of the team, oldest first, with the names."""
        names = {row.snapshot_id: row.name for row in self._rows.of_team(team.team_id)}
        return [(row, names.get(row.snapshot_id, "")) for row in self._node.snapshots(sandbox_id)]

    def delete(self, row: TeamSnapshot) -> None:
        """Removes one; sandboxes that were made of it go on. aborted while it is being restored."""
        try:
            self._node.remove_snapshot(row.snapshot_id)
        except CallerError as error:
            if error.code != "not_found":
                raise
        self._rows.forget([row.snapshot_id])


def normal_name(team: Team, text: str) -> str:
    """`name` or `name:tag`, without the team's namespace and the default tag; CallerError."""
    name = parse_name(text)
    if name.namespace and name.namespace != namespace_of(team.name):
        raise CallerError(
            f"snapshot {text[:80]!r} is in the namespace {name.namespace!r}; yours is "
            f"{namespace_of(team.name)!r}",
            code="permission_denied",
        )
    return name.name if name.tag in ("", DEFAULT_TAG) else f"{name.name}:{name.tag}"


def new_snapshot_id() -> str:
    """A fresh id of a snapshot that clients may name."""
    return "snap-" + "".join(secrets.choice(_ALPHABET) for _ in range(20))
