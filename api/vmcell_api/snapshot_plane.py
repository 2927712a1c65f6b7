"""The verbs that need snapshots, without HTTP: pause, resume, snapshots, fork, rollback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vmcell_api.coded_errors import CodedCallerError, CodedHostError
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import ControlPlane, Pair
from vmcell_api.guest_http import fetch
from vmcell_api.node_channel import is_undone
from vmcell_api.node_client import PAUSED, NodeSnapshot, NodeVerbs, RunningSandbox
from vmcell_api.snapshot_catalog import SnapshotCatalog, new_snapshot_id, normal_name
from vmcell_api.snapshot_facts import FileChange
from vmcell_api.store.records import Team
from vmcell_api.store.snapshot_rows import TeamSnapshot
from vmcell_protos.errors import CallerError, VmcellError

log = logging.getLogger("vmcell.api")

# A fork's own snapshot is removed when it is done; this is for an API that dies meanwhile.
FORK_SNAPSHOT_LIFE_S = 900
FORKS_AT_ONCE = 8
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Fork:
    """One copy of a sandbox, or why there is none."""

    made: Pair | None = None
    error: VmcellError | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two snapshots of one sandbox; `changed` are names of their own files that differ.

    `files` are the guest's; none when only the snapshots' own were compared.
    """

    older: NodeSnapshot
    newer: NodeSnapshot
    changed: tuple[str, ...]
    files: Sequence[FileChange] | None = None


class SnapshotPlane:
    """The verbs for one team at a time; thread-safe."""

    def __init__(
        self, control: ControlPlane, catalog: SnapshotCatalog, node: NodeVerbs, config: ApiConfig
    ) -> None:
        self._control = control
        self._catalog = catalog
        self._node = node
        self._config = config

    def pause(self, team: Team, sandbox_id: str, *, must_be_healthy: bool = False) -> None:
        """Saves a sandbox and frees its place; CallerError aborted when it is paused already."""
        record, running = self._control.get(team, sandbox_id)
        if must_be_healthy and running.state != PAUSED:
            self._check_health(running)
        self._node.pause(record.sandbox_id)

    @staticmethod
    def _check_health(running: RunningSandbox) -> None:
        try:
            fetch(
                running.address,
                "/health",
                access_token="",
                limit_bytes=4096,
                timeout_s=HEALTH_TIMEOUT_S,
            )
        except VmcellError as error:
            raise CodedCallerError(
                f"sandbox {running.sandbox_id} is not paused, its envd is not well: {error}",
                error_code="sandbox_snapshot_guest_agent_unresponsive",
                code="aborted",
            ) from error

    def connect(self, team: Team, sandbox_id: str, timeout_s: int) -> tuple[Pair, bool]:
        """(the sandbox running, whether it was paused before); a later end stays."""
        record, running = self._control.get(team, sandbox_id)
        if running.state == PAUSED:
            self._control.check_room_for(team)
        try:
            # 0 would be what the create gave it; here it is no time at all.
            woken, resumed = self._node.resume(record.sandbox_id, max(1, timeout_s))
        except VmcellError as error:
            raise self._resume_error(error, f"sandbox {record.sandbox_id}") from error
        return (record, woken), resumed

    def resume(self, team: Team, sandbox_id: str, timeout_s: int) -> Pair:
        """A paused sandbox, running; CallerError aborted when it ran already."""
        pair, resumed = self.connect(team, sandbox_id, timeout_s)
        if not resumed:
            raise CallerError(f"sandbox {sandbox_id[:60]} is running already", code="aborted")
        return pair

    # Snapshots.

    def make(self, team: Team, sandbox_id: str, name: str) -> TeamSnapshot:
        """A snapshot of a running sandbox, which goes on."""
        record, running = self._control.get(team, sandbox_id)
        wanted = normal_name(team, name) if name else ""
        if wanted and self._control.is_template(team, wanted):
            raise CallerError(
                f"{wanted!r} is the name of a template; give the snapshot another one",
                code="aborted",
            )
        return self._catalog.make(team, running, bool(record.access_token), wanted)

    def list(self, team: Team, *, sandbox_id: str, name: str) -> list[TeamSnapshot]:
        """The team's snapshots, newest first."""
        return self._catalog.list(team, sandbox_id=sandbox_id, name=name)

    def delete(self, team: Team, text: str) -> bool:
        """Deletes the team's snapshot of that id or name; False when it has none."""
        row = self._catalog.by_id(team, text)
        if row is None and not self._control.is_template(team, text):
            row = self._catalog.by_name(team, text)
        if row is None:
            return False
        self._catalog.delete(row)
        return True

    def history(self, team: Team, sandbox_id: str) -> Sequence[tuple[NodeSnapshot, str]]:
        """The snapshots of a sandbox with their names, undo points too, oldest first."""
        record, _ = self._control.get(team, sandbox_id)
        return self._catalog.of_sandbox(team, record.sandbox_id)

    def difference(
        self, team: Team, sandbox_id: str, older: str, newer: str, *, by_file: bool
    ) -> Difference:
        """What differs between two snapshots of a sandbox, as their manifests tell.

        `by_file`: both are restored for a moment and say which files they have; 409 without room.
        """
        rows = {row.snapshot_id: row for row, _ in self.history(team, sandbox_id)}
        for name in (older, newer):
            if name not in rows:
                raise CallerError(
                    f"snapshot {name[:60]!r} is none of sandbox {sandbox_id[:60]}", code="not_found"
                )
        before = {row.name: row.digest for row in rows[older].files}
        after = {row.name: row.digest for row in rows[newer].files}
        names = sorted(before.keys() | after.keys())
        changed = tuple(name for name in names if before.get(name) != after.get(name))
        files = self._changed_files(older, newer) if by_file else None
        return Difference(older=rows[older], newer=rows[newer], changed=changed, files=files)

    def _changed_files(self, older: str, newer: str) -> Sequence[FileChange]:
        try:
            return self._node.file_changes(older, newer)
        except VmcellError as error:
            raise self._resume_error(error, f"snapshot {older} or {newer}") from error

    def memory(self, team: Team, sandbox_id: str) -> dict[str, object]:
        """What a running sandbox has of the host's memory."""
        record, _ = self._control.get(team, sandbox_id)
        return self._node.memory(record.sandbox_id)

    # Copies.

    def fork(self, team: Team, sandbox_id: str, *, count: int, timeout_s: int) -> Sequence[Fork]:
        """Copies of a running sandbox, each made or with an error.

        CallerError aborted, with the numbers, when the node has no room for all of them.
        """
        record, running = self._control.get(team, sandbox_id)
        free = self._node.info().slots_free
        if free < count:
            raise CodedCallerError(
                f"the node has room for {free} sandboxes, not for {count}; nothing was made",
                error_code="sandbox_capacity_unavailable",
                code="aborted",
            )
        snapshot_id = new_snapshot_id()
        try:
            self._node.make_snapshot(record.sandbox_id, snapshot_id, life_s=FORK_SNAPSHOT_LIFE_S)
            with ThreadPoolExecutor(min(count, FORKS_AT_ONCE), "fork") as pool:
                calls = [
                    pool.submit(
                        self._control.copy, team, record, running, snapshot_id, timeout_s=timeout_s
                    )
                    for _ in range(count)
                ]
                return [_outcome(call.result) for call in calls]
        finally:
            self._remove_forks_snapshot(snapshot_id)

    def _remove_forks_snapshot(self, snapshot_id: str) -> None:
        try:
            self._node.remove_snapshot(snapshot_id)
        except VmcellError as error:
            if error.code != "not_found":
                log.error("snapshot %s of a fork is left for a while: %s", snapshot_id, error)

    def rollback(self, team: Team, sandbox_id: str, snapshot: str) -> tuple[Pair, NodeSnapshot]:
        """(the sandbox as one of its snapshots has it, the undo point)."""
        record, _ = self._control.get(team, sandbox_id)
        row = self._catalog.find(team, snapshot)
        snapshot_id = row.snapshot_id if row else snapshot
        if row is not None and row.sandbox_id != record.sandbox_id:
            raise CallerError(
                f"snapshot {snapshot[:60]!r} is of another sandbox; create one from it instead",
                code="not_found",
            )
        try:
            running, undo = self._node.rollback(
                record.sandbox_id, snapshot_id, undo_life_s=self._config.undo_minutes * 60
            )
        except VmcellError as error:
            raise self._resume_error(error, f"snapshot {snapshot[:60]!r}") from error
        return (record, running), undo

    def undo(self, team: Team, sandbox_id: str) -> tuple[Pair, NodeSnapshot]:
        """Back to what was before the last rollback, which can be undone as well."""
        points = [row for row, _ in self.history(team, sandbox_id) if row.is_undo_point]
        if not points:
            raise CallerError(
                f"sandbox {sandbox_id[:60]} has nothing to undo: no rollback within the last "
                f"{self._config.undo_minutes} minutes",
                code="failed_precondition",
            )
        return self.rollback(team, sandbox_id, points[-1].snapshot_id)

    def _resume_error(self, error: VmcellError, what: str) -> VmcellError:
        """No room is the client's to know in numbers; a damaged snapshot is nothing to retry."""
        if error.code == "resource_exhausted":
            info = self._node.info()
            return CodedHostError(
                f"{what} cannot be restored: {info.slots_free} of {info.slot_count} places of the "
                "node are free; try again when a sandbox has ended",
                error_code="sandbox_capacity_unavailable",
                code=error.code,
                status=409,
            )
        if error.code in ("unavailable", "data_loss", "unknown") and is_undone(error):
            words = f"{what} could not be restored: {error}"
            return CodedHostError(words, error_code="sandbox_create_failed", code="internal")
        return error


def _outcome(result: Callable[[], Pair]) -> Fork:
    try:
        return Fork(made=result())
    except VmcellError as error:
        return Fork(error=error)
