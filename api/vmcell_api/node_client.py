"""The API's side of noded's door.

`NodeVerbs` is what the rest of the API knows of a node; `NodeClient` is the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vmcell_api.egress import OPEN, Egress
from vmcell_api.guest_http import fetch
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node_channel import NodeChannel
from vmcell_api.snapshot_facts import FileChange, SnapshotFile
from vmcell_api.volumes.names import VolumeMount
from vmcell_protos.pb import node_pb2, node_pb2_grpc

KILL_TIMEOUT_S = 60.0
# Saving a machine of many GiB to a slow disk; noded gives up a little earlier.
SAVE_TIMEOUT_S = 330.0
# Each of two guests has a minute to list its files.
DIFF_TIMEOUT_S = 150.0
# A guest that answers slowly must not hold the API's threads for long.
LOGS_BYTES, LOGS_TIMEOUT_S = 4 << 20, 10.0
# A volume may have millions of files.
REMOVE_VOLUME_TIMEOUT_S = 600.0

RUNNING, PAUSING, PAUSED = "running", "pausing", "paused"

JsonNumbers = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class NewSandbox:
    """What the API asks a node to make."""

    sandbox_id: str
    template_id: str
    image: str
    vcpus: int
    memory_mib: int
    timeout_s: int
    environment: dict[str, str] = field(default_factory=dict)
    access_token: str = field(default="", repr=False)
    default_user: str = ""
    egress: Egress = OPEN
    default_workdir: str = ""
    start_command: str = ""
    ready_command: str = ""
    volume_mounts: tuple[VolumeMount, ...] = ()
    pause_on_timeout: bool = False
    auto_resume: bool = False
    snapshot_id: str = ""


@dataclass(frozen=True, kw_only=True)
class RunningSandbox:
    """A sandbox as the node sees it; times are unix milliseconds, `address` is IPv4.

    `state` is one of the words below: only a RUNNING one has an address that answers, and a PAUSING
    one is RUNNING again when somebody resumes it in time.
    """

    sandbox_id: str
    template_id: str
    image: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    started_at_unix_ms: int
    end_at_unix_ms: int
    address: str
    egress: Egress = OPEN
    volume_mounts: tuple[VolumeMount, ...] = ()
    state: str = RUNNING
    pause_on_timeout: bool = False
    auto_resume: bool = False


@dataclass(frozen=True, kw_only=True)
class NodeSnapshot:
    """A snapshot as the node has it; times are unix milliseconds, 0: it does not expire.

    `secured`: the envd in it asks for a token. `allocated` are bytes on disk, those included that
    it shares with others.
    """

    snapshot_id: str
    sandbox_id: str
    template_id: str
    vcpus: int
    memory_mib: int
    created_at_unix_ms: int
    expires_at_unix_ms: int = 0
    parent: str = ""
    secured: bool = True
    size: int = 0
    allocated: int = 0
    files: tuple[SnapshotFile, ...] = ()

    @property
    def is_undo_point(self) -> bool:
        """Whether it is what a sandbox was before a rollback."""
        return self.snapshot_id.startswith("undo-")


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """What a node says of itself."""

    containerd_version: str
    slot_count: int
    slots_free: int


class NodeVerbs(Protocol):
    """The fixed verbs of a node; each raises CallerError or HostError."""

    def create(self, sandbox: NewSandbox) -> RunningSandbox:
        """Makes a sandbox and answers when it can be used."""

    def kill(self, sandbox_id: str) -> None:
        """Ends a sandbox; not_found when there is none."""

    def get(self, sandbox_id: str) -> RunningSandbox:
        """One sandbox, in whatever state; not_found when there is none."""

    def list(self) -> list[RunningSandbox]:
        """The sandboxes in whatever state, oldest first."""

    def set_deadline(self, sandbox_id: str, timeout_s: int, *, only_extend: bool) -> RunningSandbox:
        """Moves the end to `timeout_s` from now."""

    def pause(self, sandbox_id: str) -> RunningSandbox:
        """Saves it and ends its machine; aborted: it is paused already, or was called off."""

    def resume(
        self, sandbox_id: str, timeout_s: int, *, by_request: bool = False
    ) -> tuple[RunningSandbox, bool]:
        """(the sandbox running, whether this call restored it); a later end stays.

        `timeout_s` 0: as at first. `by_request` of its ports: failed_precondition for a paused
        sandbox that these do not wake.
        """

    def make_snapshot(self, sandbox_id: str, snapshot_id: str, *, life_s: int = 0) -> NodeSnapshot:
        """A snapshot of a running sandbox; it is removed after `life_s` unless 0."""

    def snapshots(self, sandbox_id: str = "") -> Sequence[NodeSnapshot]:
        """All, or those of one sandbox, oldest first."""

    def remove_snapshot(self, snapshot_id: str) -> None:
        """Removes one; not_found when there is none, aborted while it is being restored."""

    def rollback(
        self, sandbox_id: str, snapshot_id: str, *, undo_life_s: int
    ) -> tuple[RunningSandbox, NodeSnapshot]:
        """(the sandbox as that snapshot has it, what it was before)."""

    def file_changes(self, older_id: str, newer_id: str) -> Sequence[FileChange]:
        """Which files differ between two snapshots, as two guests restored from them say."""

    def memory(self, sandbox_id: str) -> JsonNumbers:
        """What a running sandbox has of the host's memory, as the API answers it."""

    def info(self) -> NodeInfo:
        """What the node is, and how much of it is free."""

    def set_egress(self, sandbox_id: str, egress: Egress) -> RunningSandbox:
        """Changes what a sandbox may reach, for good."""

    def metrics(
        self,
        sandbox_ids: Sequence[str],
        *,
        start_unix_ms: int = 0,
        end_unix_ms: int = 0,
        newest_only: bool = False,
    ) -> dict[str, Sequence[MetricSample]]:
        """What sandboxes used, oldest first; one that is not running is left out.

        `end_unix_ms` 0: until now.
        """

    def envd_logs(self, running: RunningSandbox, access_token: str) -> bytes:
        """What envd answers to `GET /logs`: the guest's words, not checked."""

    def make_volume(self, volume_id: str) -> None:
        """Makes an empty volume; one that is there stays as it is."""

    def remove_volume(self, volume_id: str) -> None:
        """Removes a volume, a missing one too; aborted while a sandbox has it."""


class NodeClient:
    """`NodeVerbs` of noded over its unix socket; thread-safe, `close()` is idempotent."""

    def __init__(self, socket_path: str, *, create_timeout_s: float) -> None:
        self._create_timeout_s = create_timeout_s
        self._channel = NodeChannel(socket_path, node_pb2_grpc.NodeStub)
        self._call = self._channel.call

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def create(self, sandbox: NewSandbox) -> RunningSandbox:
        request = node_pb2.CreateSandboxRequest(
            sandbox_id=sandbox.sandbox_id,
            template_id=sandbox.template_id,
            image=sandbox.image,
            vcpus=sandbox.vcpus,
            memory_mib=sandbox.memory_mib,
            timeout_ms=sandbox.timeout_s * 1000,
            environment=sandbox.environment,
            access_token=sandbox.access_token,
            default_user=sandbox.default_user,
            allow_internet=sandbox.egress.allow_internet,
            allow_out=sandbox.egress.allow_out,
            deny_out=sandbox.egress.deny_out,
            default_workdir=sandbox.default_workdir,
            start_command=sandbox.start_command,
            ready_command=sandbox.ready_command,
            volume_mounts=[node_pb2.VolumeMount(**vars(row)) for row in sandbox.volume_mounts],
            pause_on_timeout=sandbox.pause_on_timeout,
            auto_resume=sandbox.auto_resume,
            snapshot_id=sandbox.snapshot_id,
        )
        return _running(self._call("CreateSandbox", request, self._create_timeout_s))

    def kill(self, sandbox_id: str) -> None:
        self._call("KillSandbox", node_pb2.SandboxRef(sandbox_id=sandbox_id), KILL_TIMEOUT_S)

    def get(self, sandbox_id: str) -> RunningSandbox:
        return _running(self._call("GetSandbox", node_pb2.SandboxRef(sandbox_id=sandbox_id)))

    def list(self) -> list[RunningSandbox]:
        answer = self._call("ListSandboxes", node_pb2.ListSandboxesRequest())
        return [_running(message) for message in answer.sandboxes]

    def set_deadline(self, sandbox_id: str, timeout_s: int, *, only_extend: bool) -> RunningSandbox:
        request = node_pb2.SetDeadlineRequest(
            sandbox_id=sandbox_id, timeout_ms=timeout_s * 1000, only_extend=only_extend
        )
        return _running(self._call("SetDeadline", request))

    def pause(self, sandbox_id: str) -> RunningSandbox:
        request = node_pb2.SandboxRef(sandbox_id=sandbox_id)
        return _running(self._call("PauseSandbox", request, SAVE_TIMEOUT_S))

    def resume(
        self, sandbox_id: str, timeout_s: int, *, by_request: bool = False
    ) -> tuple[RunningSandbox, bool]:
        request = node_pb2.ResumeSandboxRequest(
            sandbox_id=sandbox_id, timeout_ms=timeout_s * 1000, by_request=by_request
        )
        # It may wait for a save before it begins.
        answer = self._call("ResumeSandbox", request, SAVE_TIMEOUT_S + self._create_timeout_s)
        return _running(answer.sandbox), answer.resumed

    def make_snapshot(self, sandbox_id: str, snapshot_id: str, *, life_s: int = 0) -> NodeSnapshot:
        request = node_pb2.MakeSnapshotRequest(
            sandbox_id=sandbox_id, snapshot_id=snapshot_id, life_ms=life_s * 1000
        )
        return _snapshot(self._call("MakeSnapshot", request, SAVE_TIMEOUT_S))

    def snapshots(self, sandbox_id: str = "") -> Sequence[NodeSnapshot]:
        request = node_pb2.ListSnapshotsRequest(sandbox_id=sandbox_id)
        return [_snapshot(message) for message in self._call("ListSnapshots", request).snapshots]

    def remove_snapshot(self, snapshot_id: str) -> None:
        self._call("RemoveSnapshot", node_pb2.SnapshotRef(snapshot_id=snapshot_id))

    def rollback(
        self, sandbox_id: str, snapshot_id: str, *, undo_life_s: int
    ) -> tuple[RunningSandbox, NodeSnapshot]:
        request = node_pb2.RollbackRequest(
            sandbox_id=sandbox_id, snapshot_id=snapshot_id, undo_life_ms=undo_life_s * 1000
        )
        answer = self._call("RollbackSandbox", request, SAVE_TIMEOUT_S + self._create_timeout_s)
        return _running(answer.sandbox), _snapshot(answer.undo)

    def file_changes(self, older_id: str, newer_id: str) -> Sequence[FileChange]:
        request = node_pb2.DiffSnapshotsRequest(older_id=older_id, newer_id=newer_id)
        answer = self._call("DiffSnapshots", request, DIFF_TIMEOUT_S + 2 * self._create_timeout_s)
        return [
            FileChange(
                path=row.path,
                what=row.what,
                size_before=row.size_before,
                size_after=row.size_after,
            )
            for row in answer.changes
        ]

    def memory(self, sandbox_id: str) -> JsonNumbers:
        answer = self._call("ReadMemory", node_pb2.SandboxRef(sandbox_id=sandbox_id))
        return {
            "guestMemoryBytes": answer.guest_memory_bytes,
            "processes": [
                {
                    "name": row.name,
                    "pid": row.pid,
                    "own": _memory_sum(row.own),
                    "guestRam": _memory_sum(row.guest_ram),
                }
                for row in answer.processes
            ],
        }

    def info(self) -> NodeInfo:
        answer = self._call("NodeInfo", node_pb2.NodeInfoRequest())
        return NodeInfo(
            containerd_version=answer.containerd_version,
            slot_count=answer.slot_count,
            slots_free=answer.slots_free,
        )

    def set_egress(self, sandbox_id: str, egress: Egress) -> RunningSandbox:
        request = node_pb2.SetEgressRequest(
            sandbox_id=sandbox_id,
            allow_internet=egress.allow_internet,
            allow_out=egress.allow_out,
            deny_out=egress.deny_out,
        )
        return _running(self._call("SetEgress", request))

    def metrics(
        self,
        sandbox_ids: Sequence[str],
        *,
        start_unix_ms: int = 0,
        end_unix_ms: int = 0,
        newest_only: bool = False,
    ) -> dict[str, Sequence[MetricSample]]:
        request = node_pb2.ReadMetricsRequest(
            sandbox_ids=sandbox_ids,
            start_unix_ms=start_unix_ms,
            end_unix_ms=end_unix_ms,
            newest_only=newest_only,
        )
        answer = self._call("ReadMetrics", request)
        return {
            row.sandbox_id: [_sample(message) for message in row.samples]
            for row in answer.sandboxes
        }

    def envd_logs(self, running: RunningSandbox, access_token: str) -> bytes:
        """What envd answers to `GET /logs`; noded is not asked, it need not read a guest's words.

        Raises HostError when envd does not answer, GuestError when it answers nonsense.
        """
        return fetch(
            running.address,
            "/logs",
            access_token=access_token,
            limit_bytes=LOGS_BYTES,
            timeout_s=LOGS_TIMEOUT_S,
        )

    def make_volume(self, volume_id: str) -> None:
        self._call("MakeVolume", node_pb2.VolumeRef(volume_id=volume_id))

    def remove_volume(self, volume_id: str) -> None:
        self._call("RemoveVolume", node_pb2.VolumeRef(volume_id=volume_id), REMOVE_VOLUME_TIMEOUT_S)


def _running(message: node_pb2.Sandbox) -> RunningSandbox:
    return RunningSandbox(
        sandbox_id=message.sandbox_id,
        template_id=message.template_id,
        image=message.image,
        vcpus=message.vcpus,
        memory_mib=message.memory_mib,
        disk_mib=message.disk_mib,
        started_at_unix_ms=message.started_at_unix_ms,
        end_at_unix_ms=message.end_at_unix_ms,
        address=message.address,
        egress=Egress(
            allow_internet=message.allow_internet,
            allow_out=tuple(message.allow_out),
            deny_out=tuple(message.deny_out),
        ),
        volume_mounts=tuple(
            VolumeMount(volume_id=row.volume_id, name=row.name, path=row.path)
            for row in message.volume_mounts
        ),
        state=message.state,
        pause_on_timeout=message.pause_on_timeout,
        auto_resume=message.auto_resume,
    )


def _snapshot(message: node_pb2.Snapshot) -> NodeSnapshot:
    return NodeSnapshot(
        snapshot_id=message.snapshot_id,
        sandbox_id=message.sandbox_id,
        template_id=message.template_id,
        vcpus=message.vcpus,
        memory_mib=message.memory_mib,
        created_at_unix_ms=message.created_at_unix_ms,
        expires_at_unix_ms=message.expires_at_unix_ms,
        parent=message.parent,
        secured=message.secured,
        size=message.bytes,
        allocated=message.allocated_bytes,
        files=tuple(
            SnapshotFile(
                name=row.name, size=row.bytes, allocated=row.allocated_bytes, digest=row.digest
            )
            for row in message.files
        ),
    )


def _memory_sum(message: node_pb2.MemorySum) -> JsonNumbers:
    return {
        "rssBytes": message.rss_bytes,
        "pssBytes": message.pss_bytes,
        "sharedCleanBytes": message.shared_clean_bytes,
        "sharedDirtyBytes": message.shared_dirty_bytes,
        "privateCleanBytes": message.private_clean_bytes,
        "privateDirtyBytes": message.private_dirty_bytes,
        "swapBytes": message.swap_bytes,
    }


def _sample(message: node_pb2.MetricSample) -> MetricSample:
    return MetricSample(**{name: getattr(message, name) for name in MetricSample.__slots__})
