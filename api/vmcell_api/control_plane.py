"""What the API does, without HTTP: joins what the node runs with what the store knows.

The store's row is written before the node is asked, so no sandbox can run without an owner; rows
whose sandbox is gone are dropped when they are met.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from vmcell_api.coded_errors import CodedHostError
from vmcell_api.config import ApiConfig
from vmcell_api.egress import Egress
from vmcell_api.identifiers import new_access_token, new_sandbox_id, sandbox_id_of
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node_channel import NodeUnreachable, is_undone
from vmcell_api.node_client import PAUSED, NewSandbox, NodeVerbs, RunningSandbox
from vmcell_api.sandbox_bodies import CreateBody, ListQuery
from vmcell_api.sandbox_logs import LogEntry, parse_entries
from vmcell_api.snapshot_catalog import SnapshotCatalog
from vmcell_api.store.records import SandboxRecord, Store, Team, Template, now_ms
from vmcell_api.store.snapshot_rows import TeamSnapshot
from vmcell_api.template_plane import OWN_IMAGES, TemplatePlane
from vmcell_api.volume_control import VolumeControl
from vmcell_protos.errors import CallerError, GuestError, HostError, VmcellError

log = logging.getLogger("vmcell.api")

DEFAULT_VCPUS = 1
DEFAULT_MEMORY_MIB = 512
LOST_AFTER_MS = 60_000

Pair = tuple[SandboxRecord, RunningSandbox]


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a list; `following` is the last entry when more come after it."""

    entries: list[Pair]
    following: Pair | None
    running_count: int


class ControlPlane:
    """The verbs of the API for one team at a time; thread-safe."""

    def __init__(
        self,
        store: Store,
        node: NodeVerbs,
        config: ApiConfig,
        templates: TemplatePlane,
        volumes: VolumeControl,
        snapshots: SnapshotCatalog,
    ) -> None:
        self._snapshots = snapshots
        self._volumes = volumes
        self._store = store
        self._templates = templates
        self._node = node
        self._config = config

    def create(self, team: Team, body: CreateBody, *, sandbox_id: str = "") -> Pair:
        """Makes a sandbox of that fresh id.

        Raises CallerError not_found for an unknown template, snapshot or volume.
        """
        source = self._source(team, body.template)
        mounts = self._volumes.mounts(team, body.volume_mounts)
        # envd's memory decides, where it is restored, whether it asks for a token.
        secured = source.secured if isinstance(source, TeamSnapshot) else body.secured
        record = SandboxRecord(
            sandbox_id=sandbox_id or new_sandbox_id(),
            team_id=team.team_id,
            template_id=source.snapshot_id if isinstance(source, TeamSnapshot) else source.name,
            access_token=new_access_token() if secured else "",
            traffic_token="" if body.network.is_public else new_access_token(),
            metadata=body.metadata,
            created_at_unix_ms=now_ms(),
        )
        if isinstance(source, TeamSnapshot):
            order = self._snapshot_order(record, source, body)
        else:
            order = self._order(record, source, body)
        return self._make(team, record, replace(order, volume_mounts=mounts), body.template)

    def copy(
        self,
        team: Team,
        record: SandboxRecord,
        running: RunningSandbox,
        snapshot_id: str,
        *,
        timeout_s: int,
    ) -> Pair:
        """Makes a sandbox like another of the team, of a snapshot of that one."""
        copied = replace(
            record,
            sandbox_id=new_sandbox_id(),
            access_token=new_access_token() if record.access_token else "",
            traffic_token=new_access_token() if record.traffic_token else "",
            created_at_unix_ms=now_ms(),
        )
        order = NewSandbox(
            sandbox_id=copied.sandbox_id,
            template_id=running.template_id,
            image=running.image,
            vcpus=running.vcpus,
            memory_mib=running.memory_mib,
            timeout_s=timeout_s,
            access_token=copied.access_token,
            egress=running.egress,
            pause_on_timeout=running.pause_on_timeout,
            auto_resume=running.auto_resume,
            snapshot_id=snapshot_id,
        )
        return self._make(team, copied, order, snapshot_id)

    def _make(self, team: Team, record: SandboxRecord, order: NewSandbox, name: str) -> Pair:
        """`name` is what the client calls the source."""
        here = self._node.list()
        rows = self._store.sandboxes(team_id=team.team_id)
        self._drop_lost(rows, {running.sandbox_id for running in here})
        self._store.add_sandbox(record, limit=team.sandbox_limit, live=_running_ids(here))
        try:
            running = self._node.create(order)
        except VmcellError as error:
            if is_undone(error):
                self._store.forget_sandboxes([record.sandbox_id])
            raise _create_error(error, name) from error
        try:
            self._store.mark_built(record.sandbox_id)
            self._templates.count_spawn(record.template_id)
        except HostError as error:  # costs a place in the team's limit for a while, no more
            log.error("sandbox %s runs, but %s", record.sandbox_id, error)
        return record, running

    def check_room_for(self, team: Team) -> None:
        """CallerError resource_exhausted when the team may not have one more running sandbox."""
        own = self._store.sandboxes(team_id=team.team_id).keys()
        count = len(own & _running_ids(self._node.list()))
        if count >= team.sandbox_limit:
            raise CallerError(
                f"the team has {count} running sandboxes of at most {team.sandbox_limit}; kill or "
                "pause one first",
                code="resource_exhausted",
            )

    def is_template(self, team: Team, name: str) -> bool:
        """Whether that is the name or id of a template that the team may use."""
        return self._templates.is_known(team, name)

    def may_exist(self, team: Team, sandbox_id: str) -> bool:
        """Whether a create of that id is not known to have left nothing."""
        return self._store.sandbox(sandbox_id, team_id=team.team_id) is not None

    def kill(self, team: Team, sandbox_id: str) -> None:
        """Ends a sandbox of the team; CallerError not_found."""
        record = self._record(team, sandbox_id)
        self._node.kill(record.sandbox_id)
        self._store.forget_sandboxes([record.sandbox_id])

    def get(self, team: Team, sandbox_id: str) -> Pair:
        """A sandbox of the team, running or paused; CallerError not_found."""
        record = self._record(team, sandbox_id)
        return record, self._node.get(record.sandbox_id)

    def set_timeout(
        self, team: Team, sandbox_id: str, timeout_s: int, *, only_extend: bool = False
    ) -> Pair:
        """Moves the end of a sandbox to `timeout_s` from now; CallerError not_found."""
        record = self._record(team, sandbox_id)
        running = self._node.set_deadline(record.sandbox_id, timeout_s, only_extend=only_extend)
        return record, running

    def set_egress(self, team: Team, sandbox_id: str, egress: Egress) -> Pair:
        """Changes what a sandbox may reach; CallerError not_found."""
        record = self._record(team, sandbox_id)
        return record, self._node.set_egress(record.sandbox_id, egress)

    def metrics(
        self, team: Team, sandbox_id: str, *, start_unix_ms: int, end_unix_ms: int
    ) -> Sequence[MetricSample]:
        """What a sandbox used in that time, nothing of a paused one; CallerError not_found."""
        record = self._record(team, sandbox_id)
        found = self._node.metrics(
            [record.sandbox_id], start_unix_ms=start_unix_ms, end_unix_ms=end_unix_ms
        )
        if record.sandbox_id not in found:
            self._node.get(record.sandbox_id)  # raises not_found unless it is paused
            return []
        return found[record.sandbox_id]

    def newest_metrics(self, team: Team, sandbox_ids: Sequence[str]) -> dict[str, MetricSample]:
        """The last sample of those of `sandbox_ids` that are the team's, run and have one."""
        own = self._store.sandboxes(team_id=team.team_id).keys() & set(sandbox_ids)
        found = self._node.metrics(sorted(own), newest_only=True)
        return {name: samples[-1] for name, samples in found.items() if samples}

    def logs(self, team: Team, sandbox_id: str) -> Sequence[LogEntry]:
        """What envd of a running sandbox keeps of its log, oldest first; CallerError not_found."""
        record, running = self.get(team, sandbox_id)
        if running.state == PAUSED:
            raise CallerError(
                f"sandbox {record.sandbox_id} is paused; resume it to read its log", code="aborted"
            )
        try:
            return parse_entries(self._node.envd_logs(running, record.access_token))
        except GuestError as error:
            raise CodedHostError(
                f"sandbox {record.sandbox_id} did not give its log: {error}",
                error_code="sandbox_guest_answer_invalid",
                status=502,
            ) from error

    def list(self, team: Team, query: ListQuery) -> Page:
        """The team's sandboxes that match, newest first unless asked otherwise."""
        if query.template:
            query = replace(query, template=self._templates.id_of(team, query.template))
        by_id = {running.sandbox_id: running for running in self._node.list()}
        records = self._store.sandboxes(team_id=team.team_id)
        self._drop_lost(records, by_id.keys())
        pairs = [(record, by_id[key]) for key, record in records.items() if key in by_id]
        matching = [pair for pair in pairs if _matches(pair, query)]
        matching.sort(key=_position, reverse=not query.ascending)
        if query.after is not None:
            matching = [pair for pair in matching if _comes_after(pair, query)]
        page = matching[: query.limit]
        more = len(matching) > len(page)
        running_count = sum(1 for _, running in pairs if running.state != PAUSED)
        return Page(entries=page, following=page[-1] if more else None, running_count=running_count)

    def _source(self, team: Team, name: str) -> Template | TeamSnapshot:
        """What a sandbox is made of: a template, a snapshot or an image, in this order by name."""
        return (
            self._snapshots.by_id(team, name)
            or self._templates.resolve(team, name)
            or self._snapshots.by_name(team, name)
            or self._image(name)
        )

    @staticmethod
    def _image(name: str) -> Template:
        """The imported image of that name, which only the node can say whether it is there."""
        if name.startswith(OWN_IMAGES):  # what builds made belongs to teams
            raise CallerError(f"template {name[:80]!r} does not exist", code="not_found")
        return Template(name=name, image=name, vcpus=DEFAULT_VCPUS, memory_mib=DEFAULT_MEMORY_MIB)

    def _order(self, record: SandboxRecord, template: Template, body: CreateBody) -> NewSandbox:
        return NewSandbox(
            sandbox_id=record.sandbox_id,
            template_id=template.name,
            image=template.image,
            vcpus=template.vcpus,
            memory_mib=template.memory_mib,
            timeout_s=body.timeout_s,
            environment=body.environment,
            access_token=record.access_token,
            default_user=template.default_user or self._config.default_user,
            egress=body.network.egress,
            default_workdir=template.default_workdir,
            start_command=template.start_command,
            ready_command=template.ready_command,
            pause_on_timeout=body.pause_on_timeout,
            auto_resume=body.auto_resume,
        )

    @staticmethod
    def _snapshot_order(
        record: SandboxRecord, snapshot: TeamSnapshot, body: CreateBody
    ) -> NewSandbox:
        return NewSandbox(
            sandbox_id=record.sandbox_id,
            template_id=record.template_id,
            image=snapshot.template_id,
            vcpus=snapshot.vcpus,
            memory_mib=snapshot.memory_mib,
            timeout_s=body.timeout_s,
            environment=body.environment,
            access_token=record.access_token,
            egress=body.network.egress,
            pause_on_timeout=body.pause_on_timeout,
            auto_resume=body.auto_resume,
            snapshot_id=snapshot.snapshot_id,
        )

    def _record(self, team: Team, text: str) -> SandboxRecord:
        """The team's row; another team's sandbox is as unknown as none at all."""
        sandbox_id = sandbox_id_of(text)
        record = sandbox_id and self._store.sandbox(sandbox_id, team_id=team.team_id)
        if not record:
            raise CallerError(f"sandbox {text[:60]!r} was not found", code="not_found")
        return record

    def _drop_lost(self, records: dict[str, SandboxRecord], live: Collection[str]) -> None:
        """Forgets rows whose sandbox ended by itself; fresh ones may still be in the making."""
        newest_ms = now_ms() - self._config.start_timeout_s * 1000 - LOST_AFTER_MS
        lost = [
            key
            for key, record in records.items()
            if key not in live and record.created_at_unix_ms < newest_ms
        ]
        if lost:
            self._store.forget_sandboxes(lost)


def _running_ids(here: Sequence[RunningSandbox]) -> set[str]:
    return {running.sandbox_id for running in here if running.state != PAUSED}


def _create_error(error: VmcellError, template: str) -> VmcellError:
    """What a failed create is called: a machine that did not start is nothing to try again."""
    if error.code == "not_found":
        return CallerError(f"template {template!r} does not exist: {error}", code="not_found")
    if isinstance(error, NodeUnreachable):
        return error
    if error.code == "resource_exhausted":
        return CodedHostError(
            str(error),
            error_code="sandbox_capacity_unavailable",
            code=error.code,
            status=503,
            retry=True,
        )
    if error.code == "deadline_exceeded":
        return CodedHostError(str(error), error_code="sandbox_placement_timeout", code=error.code)
    if error.code in ("unavailable", "internal", "unknown"):
        words = f"the sandbox could not be made: {error}"
        return CodedHostError(words, error_code="sandbox_create_failed", code="internal")
    return error


def _position(pair: Pair) -> tuple[int, str]:
    return pair[1].started_at_unix_ms, pair[0].sandbox_id


def _comes_after(pair: Pair, query: ListQuery) -> bool:
    assert query.after is not None
    if query.ascending:
        return _position(pair) > query.after
    return _position(pair) < query.after


def _matches(pair: Pair, query: ListQuery) -> bool:
    record, running = pair
    return (
        ("paused" if running.state == PAUSED else "running") in query.states
        and running.started_at_unix_ms >= query.started_after_unix_ms
        and query.template in ("", record.template_id)
        and query.metadata.items() <= record.metadata.items()
    )
