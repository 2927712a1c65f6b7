"""noded's gRPC service on its unix socket: requests checked, verbs called, errors turned.

Everything that comes in is checked here, because whoever took over the API speaks to this door.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import grpc

from vmcell_api.egress import Egress, checked_egress
from vmcell_api.identifiers import SANDBOX_ID
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node.build import SandboxRequest
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import Sandbox
from vmcell_api.node.snapshot_messages import memory_message, snapshot_message
from vmcell_api.node.snapshot_records import CLIENTS_ID, KEPT, UNDO, Manifest, SnapshotRecord
from vmcell_api.volumes.names import (
    VOLUME_ID,
    VolumeMount,
    check_mount_paths,
    check_volume_name,
)
from vmcell_protos.errors import CODES, CallerError, HostError, VmcellError
from vmcell_protos.pb import node_pb2, node_pb2_grpc

log = logging.getLogger("vmcell.noded")

MAX_VCPUS = 8
MEMORY_MIB = range(64, 262145)
MAX_TIMEOUT_MS = 400 * 24 * 3600 * 1000
MAX_NAME_LENGTH = 512
MAX_MESSAGE_BYTES = 4 << 20
DOOR_THREADS = 64

_STATUS = {row.value[0]: row for row in grpc.StatusCode}


def answering(verb: Callable) -> Callable:
    """Turns our errors into gRPC statuses; anything else is a bug and is logged as one."""

    @functools.wraps(verb)
    def call(self: object, request: object, context: grpc.ServicerContext) -> object:
        try:
            return verb(self, request)
        except VmcellError as error:
            if not isinstance(error, CallerError):
                log.error("%s: %s", verb.__name__, error)
            code, sentence = error.code, str(error)
        except Exception:
            log.exception("%s failed", verb.__name__)
            code, sentence = "internal", "noded failed; its log has the trace"
        # Tells the API's client that noded itself said so, not the transport.
        context.set_trailing_metadata((("vmcell-fault", "node"),))
        context.abort(_STATUS[CODES[code].ttrpc], sentence)
        raise AssertionError("abort returned")

    return call


class Door(node_pb2_grpc.NodeServicer):
    """The servicer of `protos/node.proto`."""

    def __init__(self, node: Node, *, disk_mib: int) -> None:
        self._node = node
        self._disk_mib = disk_mib

    @answering
    def CreateSandbox(self, request: node_pb2.CreateSandboxRequest) -> node_pb2.Sandbox:
        """Builds a sandbox."""
        return self._message(self._node.create(checked_request(request)))

    @answering
    def KillSandbox(self, request: node_pb2.SandboxRef) -> node_pb2.KillSandboxResponse:
        """Ends and removes a sandbox."""
        self._node.kill(_checked_id(request.sandbox_id))
        return node_pb2.KillSandboxResponse()

    @answering
    def GetSandbox(self, request: node_pb2.SandboxRef) -> node_pb2.Sandbox:
        """One sandbox, in whatever state."""
        return self._message(self._node.get(_checked_id(request.sandbox_id)))

    @answering
    def ListSandboxes(self, _: node_pb2.ListSandboxesRequest) -> node_pb2.ListSandboxesResponse:
        """All running and paused sandboxes."""
        found = [self._message(sandbox) for sandbox in self._node.list()]
        return node_pb2.ListSandboxesResponse(sandboxes=found)

    @answering
    def SetDeadline(self, request: node_pb2.SetDeadlineRequest) -> node_pb2.Sandbox:
        """Moves a sandbox's end."""
        if request.timeout_ms > MAX_TIMEOUT_MS:
            raise CallerError(f"timeout_ms is {request.timeout_ms}; at most {MAX_TIMEOUT_MS}")
        sandbox = self._node.set_deadline(
            _checked_id(request.sandbox_id), request.timeout_ms, only_extend=request.only_extend
        )
        return self._message(sandbox)

    @answering
    def SetEgress(self, request: node_pb2.SetEgressRequest) -> node_pb2.Sandbox:
        """Changes what a sandbox may reach."""
        sandbox_id = _checked_id(request.sandbox_id)
        return self._message(self._node.set_egress(sandbox_id, _checked_egress(request)))

    @answering
    def PauseSandbox(self, request: node_pb2.SandboxRef) -> node_pb2.Sandbox:
        """Saves a sandbox and ends its machine."""
        return self._message(self._node.pause(_checked_id(request.sandbox_id)))

    @answering
    def ResumeSandbox(
        self, request: node_pb2.ResumeSandboxRequest
    ) -> node_pb2.ResumeSandboxResponse:
        """Restores a paused sandbox, or extends a running one's time."""
        if request.timeout_ms > MAX_TIMEOUT_MS:
            raise CallerError(f"timeout_ms is {request.timeout_ms}; at most {MAX_TIMEOUT_MS}")
        sandbox, resumed = self._node.resume(
            _checked_id(request.sandbox_id), request.timeout_ms, by_request=request.by_request
        )
        return node_pb2.ResumeSandboxResponse(sandbox=self._message(sandbox), resumed=resumed)

    @answering
    def MakeSnapshot(self, request: node_pb2.MakeSnapshotRequest) -> node_pb2.Snapshot:
        """A snapshot of a running sandbox."""
        if request.life_ms > MAX_TIMEOUT_MS:
            raise CallerError(f"life_ms is {request.life_ms}; at most {MAX_TIMEOUT_MS}")
        record = self._node.snapshot(
            _checked_id(request.sandbox_id),
            _checked_snapshot_id(request.snapshot_id),
            life_ms=request.life_ms,
        )
        return self._snapshot_message(record)

    @answering
    def ListSnapshots(
        self, request: node_pb2.ListSnapshotsRequest
    ) -> node_pb2.ListSnapshotsResponse:
        """The snapshots that clients may name."""
        sandbox_id = _checked_id(request.sandbox_id) if request.sandbox_id else ""
        found = [
            self._listed_snapshot(record)
            for record in self._node.snapshots.records(sandbox_id=sandbox_id)
            if record.kind in (KEPT, UNDO) and self._node.snapshots.is_whole(record.snapshot_id)
        ]
        return node_pb2.ListSnapshotsResponse(snapshots=found)

    def _listed_snapshot(self, record: SnapshotRecord) -> node_pb2.Snapshot:
        """One that is damaged, or goes meanwhile, is listed without files, so that it can go."""
        try:
            return self._snapshot_message(record)
        except HostError as error:
            log.error("%s", error)
            return snapshot_message(record, Manifest(parent="", files=()))

    @answering
    def RemoveSnapshot(self, request: node_pb2.SnapshotRef) -> node_pb2.RemoveSnapshotResponse:
        """Removes a snapshot; sandboxes that were made of it go on."""
        snapshot_id = _checked_snapshot_id(request.snapshot_id)
        self._node.snapshots.get(snapshot_id)
        self._node.snapshots.remove(snapshot_id)
        return node_pb2.RemoveSnapshotResponse()

    @answering
    def RollbackSandbox(self, request: node_pb2.RollbackRequest) -> node_pb2.RollbackResponse:
        """Takes a sandbox back to one of its snapshots."""
        if not 0 < request.undo_life_ms <= MAX_TIMEOUT_MS:
            raise CallerError(f"undo_life_ms is {request.undo_life_ms}; give 1 to {MAX_TIMEOUT_MS}")
        sandbox, undo = self._node.rollback(
            _checked_id(request.sandbox_id),
            _checked_snapshot_id(request.snapshot_id),
            undo_life_ms=request.undo_life_ms,
        )
        return node_pb2.RollbackResponse(
            sandbox=self._message(sandbox), undo=self._snapshot_message(undo)
        )

    @answering
    def DiffSnapshots(
        self, request: node_pb2.DiffSnapshotsRequest
    ) -> node_pb2.DiffSnapshotsResponse:
        """Which files differ between two snapshots."""
        older, newer = (_checked_snapshot_id(name) for name in (request.older_id, request.newer_id))
        found = self._node.file_changes(older, newer)
        rows = [node_pb2.FileChange(**asdict(row)) for row in found]
        return node_pb2.DiffSnapshotsResponse(changes=rows)

    @answering
    def ReadMemory(self, request: node_pb2.SandboxRef) -> node_pb2.MemoryUse:
        """What a sandbox has of the host's memory."""
        sandbox, processes = self._node.memory(_checked_id(request.sandbox_id))
        return memory_message(processes, sandbox.memory_mib)

    def _snapshot_message(self, record: SnapshotRecord) -> node_pb2.Snapshot:
        return snapshot_message(record, self._node.snapshots.manifest(record.snapshot_id))

    @answering
    def ReadMetrics(self, request: node_pb2.ReadMetricsRequest) -> node_pb2.ReadMetricsResponse:
        """What sandboxes used over time; those that are not there are left out."""
        found = [
            node_pb2.SandboxMetrics(
                sandbox_id=sandbox_id,
                samples=[_sample_message(sample) for sample in samples],
            )
            for sandbox_id, samples in self._node.metrics(
                [_checked_id(name) for name in request.sandbox_ids],
                start_unix_ms=request.start_unix_ms,
                end_unix_ms=request.end_unix_ms,
                newest_only=request.newest_only,
            ).items()
        ]
        return node_pb2.ReadMetricsResponse(sandboxes=found)

    @answering
    def MakeVolume(self, request: node_pb2.VolumeRef) -> node_pb2.MakeVolumeResponse:
        """Makes an empty volume."""
        self._node.volumes.make(_checked_volume_id(request.volume_id))
        return node_pb2.MakeVolumeResponse()

    @answering
    def RemoveVolume(self, request: node_pb2.VolumeRef) -> node_pb2.RemoveVolumeResponse:
        """Removes a volume with its files."""
        self._node.volumes.remove(_checked_volume_id(request.volume_id))
        return node_pb2.RemoveVolumeResponse()

    @answering
    def NodeInfo(self, _: node_pb2.NodeInfoRequest) -> node_pb2.NodeInfoResponse:
        """What this node is."""
        return node_pb2.NodeInfoResponse(
            containerd_version=self._node.containerd.version(),
            slot_count=self._node.slots.slot_count,
            slots_free=self._node.slots.free_count + self._node.pool.count,
        )

    def _message(self, sandbox: Sandbox) -> node_pb2.Sandbox:
        return node_pb2.Sandbox(
            sandbox_id=sandbox.sandbox_id,
            template_id=sandbox.template_id,
            image=sandbox.image,
            vcpus=sandbox.vcpus,
            memory_mib=sandbox.memory_mib,
            disk_mib=self._disk_mib,
            started_at_unix_ms=sandbox.started_at_unix_ms,
            end_at_unix_ms=sandbox.end_at_unix_ms,
            address=sandbox.address,
            allow_internet=sandbox.egress.allow_internet,
            allow_out=sandbox.egress.allow_out,
            deny_out=sandbox.egress.deny_out,
            volume_mounts=[node_pb2.VolumeMount(**vars(row)) for row in sandbox.volume_mounts],
            state=sandbox.state,
            pause_on_timeout=sandbox.pause_on_timeout,
            auto_resume=sandbox.auto_resume,
        )


def _sample_message(sample: MetricSample) -> node_pb2.MetricSample:
    return node_pb2.MetricSample(**asdict(sample))


def checked_request(request: node_pb2.CreateSandboxRequest) -> SandboxRequest:
    """The request as the node takes it; raises CallerError for a value out of bounds."""
    if request.snapshot_id:
        _checked_snapshot_id(request.snapshot_id)
    if not 1 <= request.vcpus <= MAX_VCPUS:
        raise CallerError(f"vcpus is {request.vcpus}; a sandbox has 1 to {MAX_VCPUS}")
    if request.memory_mib not in MEMORY_MIB:
        raise CallerError(
            f"memory is {request.memory_mib} MiB; a sandbox has {MEMORY_MIB[0]} to {MEMORY_MIB[-1]}"
        )
    if not 0 < request.timeout_ms <= MAX_TIMEOUT_MS:
        raise CallerError(f"timeout_ms is {request.timeout_ms}; give 1 to {MAX_TIMEOUT_MS}")
    for name in ("image", "template_id"):
        value = getattr(request, name)
        if not 0 < len(value) <= MAX_NAME_LENGTH or not value.isprintable():
            raise CallerError(f"{name} is {value[:80]!r}; give 1 to {MAX_NAME_LENGTH} characters")
    for key, value in request.environment.items():
        if not key or "=" in key or "\0" in key + value:
            raise CallerError(f"environment variable {key[:80]!r} cannot be set; give another name")
    return SandboxRequest(
        sandbox_id=_checked_id(request.sandbox_id),
        template_id=request.template_id,
        image=request.image,
        vcpus=request.vcpus,
        memory_mib=request.memory_mib,
        timeout_ms=request.timeout_ms,
        environment=dict(request.environment),
        access_token=request.access_token,
        default_user=request.default_user,
        egress=_checked_egress(request),
        default_workdir=request.default_workdir,
        start_command=request.start_command,
        ready_command=request.ready_command,
        volume_mounts=_checked_mounts(request),
        pause_on_timeout=request.pause_on_timeout,
        auto_resume=request.auto_resume,
        snapshot_id=request.snapshot_id,
    )


def _checked_egress(
    request: node_pb2.CreateSandboxRequest | node_pb2.SetEgressRequest,
) -> Egress:
    return checked_egress(
        allow_internet=request.allow_internet,
        allow_out=list(request.allow_out),
        deny_out=list(request.deny_out),
    )


def _checked_mounts(request: node_pb2.CreateSandboxRequest) -> tuple[VolumeMount, ...]:
    rows = request.volume_mounts
    paths = check_mount_paths([row.path for row in rows])
    return tuple(
        VolumeMount(
            volume_id=_checked_volume_id(row.volume_id),
            name=check_volume_name(row.name),
            path=path,
        )
        for row, path in zip(rows, paths, strict=True)
    )


def _checked_volume_id(volume_id: str) -> str:
    if not VOLUME_ID.fullmatch(volume_id):
        raise CallerError(f"{volume_id[:40]!r} is no volume id; one is v and 19 of a-z0-9")
    return volume_id


def _checked_snapshot_id(snapshot_id: str) -> str:
    if not CLIENTS_ID.fullmatch(snapshot_id):
        raise CallerError(
            f"{snapshot_id[:40]!r} is no snapshot id; one is snap- or undo- and 20 of a-z0-9"
        )
    return snapshot_id


def _checked_id(sandbox_id: str) -> str:
    if not SANDBOX_ID.fullmatch(sandbox_id):
        raise CallerError(f"{sandbox_id[:40]!r} is no sandbox id; one is 20 of a-z0-9")
    return sandbox_id


@contextlib.contextmanager
def only_one(socket_path: str) -> Iterator[None]:
    """Holds the lock beside `socket_path`; raises HostError when another noded has it.

    Two would settle each other's sandboxes and give one slot to two of them.
    """
    path = f"{socket_path}.lock"
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error}; run noded as root") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HostError(f"another noded holds {path}; end that one first") from error
        yield
    finally:
        os.close(lock)


def _open_way(folder: str) -> None:
    """Makes the sockets' folder and lets others pass through it, which `vmcell setup` does not."""
    os.makedirs(folder, mode=0o755, exist_ok=True)
    mode = os.stat(folder).st_mode
    if mode & 0o011 != 0o011:
        os.chmod(folder, mode | 0o011)


def serve(
    door: node_pb2_grpc.NodeServicer,
    socket_path: str,
    *,
    owner_uid: int,
    builds: node_pb2_grpc.BuildsServicer | None = None,
) -> grpc.Server:
    """A started server on `socket_path` that only root and `owner_uid` may dial.

    The caller stops it. Raises HostError when the socket cannot be made.
    """
    _open_way(os.path.dirname(socket_path))
    if os.path.exists(socket_path):
        os.unlink(socket_path)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=DOOR_THREADS, thread_name_prefix="door"),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
    )
    node_pb2_grpc.add_NodeServicer_to_server(door, server)
    if builds is not None:
        node_pb2_grpc.add_BuildsServicer_to_server(builds, server)
    old_mask = os.umask(0o117)
    try:
        server.add_insecure_port(f"unix://{socket_path}")
        os.chown(socket_path, owner_uid, 0)
    except (OSError, RuntimeError) as error:
        raise HostError(f"cannot listen on {socket_path}: {error}") from error
    finally:
        os.umask(old_mask)
    server.start()
    return server
