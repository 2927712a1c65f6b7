"""containerd's gRPC services as noded uses them; errors come out as ours.

Every call carries the namespace and a deadline. Calls that make something inside a create carry
the lease too: without one the garbage collector may take a fresh snapshot away.
"""

from __future__ import annotations

import re
import threading
import typing
from collections.abc import Callable, Iterator

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from vmcell_protos.errors import CODE_NAMES, CallerError, HostError, VmcellError
from vmcell_protos.pb.containerd import (
    containers_pb2,
    containers_pb2_grpc,
    content_pb2,
    content_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    namespaces_pb2,
    namespaces_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    types_pb2,
    version_pb2_grpc,
)

CALL_TIMEOUT_S = 60.0
SPEC_TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
EXIT_TOPIC = "/tasks/exit"
CHECKPOINT_TYPE_URL = "io.vmcell.v1.CheckpointOptions"
MAX_BLOB_BYTES = 8 << 20
_BLOB_EXISTS = re.compile(r"content (sha256:[0-9a-f]{64}): already exists")
_CALLERS_FAULT = (
    *("invalid_argument", "not_found", "already_exists", "failed_precondition", "out_of_range"),
)
# What gRPC itself says; containerd also passes on "unavailable" of a shim.
_NO_CONNECTION = "failed to connect"


def translate(error: grpc.RpcError, tried: str) -> VmcellError:
    """Our error for one of gRPC's; `tried` says what was asked, with the value."""
    code = CODE_NAMES.get(error.code().value[0], "unknown")
    kind = CallerError if code in _CALLERS_FAULT else HostError
    words = error.details() or code
    if words.startswith(_NO_CONNECTION):
        words = f"containerd does not answer ({words}); see: vmcell doctor"
    return kind(f"{tried}: {words}", code=code)


class Containerd:
    """A connection to one containerd and namespace; thread-safe, `close()` is idempotent."""

    def __init__(self, socket_path: str, *, namespace: str, snapshotter: str) -> None:
        self.namespace = namespace
        self.snapshotter = snapshotter
        self._channel = grpc.insecure_channel(
            f"unix://{socket_path}",
            options=[
                # containerd drops authorities that are paths; it wants one that looks like a host.
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", 16 << 20),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self._containers = containers_pb2_grpc.ContainersStub(self._channel)
        self._content = content_pb2_grpc.ContentStub(self._channel)
        self._events = events_pb2_grpc.EventsStub(self._channel)
        self._images = images_pb2_grpc.ImagesStub(self._channel)
        self._leases = leases_pb2_grpc.LeasesStub(self._channel)
        self._namespaces = namespaces_pb2_grpc.NamespacesStub(self._channel)
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(self._channel)
        self._tasks = tasks_pb2_grpc.TasksStub(self._channel)
        self._version = version_pb2_grpc.VersionStub(self._channel)

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()

    def call(
        self,
        method: Callable,
        request: object,
        tried: str,
        *,
        lease: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> typing.Any:
        """One call of a service of the daemon, with namespace and deadline; errors are ours."""
        metadata = [("containerd-namespace", self.namespace)]
        if lease:
            metadata.append(("containerd-lease", lease))
        try:
            return method(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise translate(error, tried) from error

    def stub(self, kind: Callable[[grpc.Channel], typing.Any]) -> typing.Any:
        """Another service of the daemon, on this connection."""
        return kind(self._channel)

    def version(self) -> str:
        """The daemon's version; raises HostError when it does not answer."""
        answer = self.call(self._version.Version, Empty(), "asking containerd's version")
        return answer.version

    def ensure_namespace(self) -> None:
        """Makes the namespace unless it is there."""
        namespace = namespaces_pb2.Namespace(name=self.namespace)
        request = namespaces_pb2.CreateNamespaceRequest(namespace=namespace)
        try:
            self.call(self._namespaces.Create, request, f"making namespace {self.namespace}")
        except CallerError as error:
            if error.code != "already_exists":
                raise

    def image_target(self, name: str) -> types_pb2.Descriptor:
        """What image `name` points at; CallerError not_found says how to import one."""
        try:
            answer = self.call(
                self._images.Get, images_pb2.GetImageRequest(name=name), f"looking up image {name}"
            )
        except CallerError as error:
            if error.code != "not_found":
                raise
            raise CallerError(
                f"image {name!r} is not on this node; import it with `vmcell image import` or "
                f"`ctr -n {self.namespace} images pull`",
                code="not_found",
            ) from error
        return answer.image.target

    def read_blob(self, digest: str) -> bytes:
        """A small blob of the content store, at most 8 MiB."""
        request = content_pb2.ReadContentRequest(digest=digest)
        stream = self.call(self._content.Read, request, f"reading blob {digest}")
        data = bytearray()
        try:
            for part in stream:
                data += part.data
                if len(data) > MAX_BLOB_BYTES:
                    raise CallerError(f"blob {digest} is larger than 8 MiB; it is no image JSON")
        except grpc.RpcError as error:
            raise translate(error, f"reading blob {digest}") from error
        return bytes(data)

    def create_lease(self, lease: str, labels: dict[str, str]) -> None:
        """Takes a lease of that id."""
        request = leases_pb2.CreateRequest(id=lease, labels=labels)
        self.call(self._leases.Create, request, f"taking lease {lease}")

    def delete_lease(self, lease: str) -> None:
        """Gives the lease back; unknown leases are fine."""
        self._delete(self._leases.Delete, leases_pb2.DeleteRequest(id=lease), f"lease {lease}")

    def keep_layers(self, lease: str, chain_id: str) -> None:
        """Keeps the committed snapshot of that name as long as the lease is there."""
        resource = leases_pb2.Resource(id=chain_id, type=f"snapshots/{self.snapshotter}")
        request = leases_pb2.AddResourceRequest(id=lease, resource=resource)
        self.call(self._leases.AddResource, request, f"keeping the layers {chain_id}")

    def lease_ids(self) -> list[str]:
        """The ids of all leases of the namespace."""
        answer = self.call(self._leases.List, leases_pb2.ListRequest(), "listing the leases")
        return [lease.id for lease in answer.leases]

    def prepare_snapshot(
        self, key: str, *, parent: str, labels: dict[str, str], lease: str
    ) -> list[types_pb2.Mount]:
        """Makes a writable snapshot above the committed one `parent`; answers its mounts."""
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=labels
        )
        tried = f"preparing snapshot {key} above {parent}"
        return list(self.call(self._snapshots.Prepare, request, tried, lease=lease).mounts)

    def remove_snapshot(self, key: str) -> None:
        """Removes a snapshot; an unknown one is fine."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key)
        self._delete(self._snapshots.Remove, request, f"snapshot {key}")

    def snapshot_parent(self, key: str) -> str:
        """The committed snapshot that `key` stands on."""
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=self.snapshotter, key=key)
        return self.call(self._snapshots.Stat, request, f"looking up snapshot {key}").info.parent

    def snapshots(self) -> list[snapshots_pb2.Info]:
        """Every snapshot of the namespace."""
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=self.snapshotter)
        stream = self.call(self._snapshots.List, request, "listing the snapshots")
        try:
            return [info for part in stream for info in part.info]
        except grpc.RpcError as error:
            raise translate(error, "listing the snapshots") from error

    def create_container(
        self,
        container_id: str,
        *,
        image: str,
        labels: dict[str, str],
        runtime: str,
        spec: bytes,
        lease: str,
    ) -> None:
        """Writes the container record; its snapshot has the container's id as key."""
        container = containers_pb2.Container(
            id=container_id,
            image=image,
            labels=labels,
            runtime=containers_pb2.Container.Runtime(name=runtime),
            spec=Any(type_url=SPEC_TYPE_URL, value=spec),
            snapshotter=self.snapshotter,
            snapshot_key=container_id,
        )
        request = containers_pb2.CreateContainerRequest(container=container)
        self.call(
            self._containers.Create, request, f"creating container {container_id}", lease=lease
        )

    def set_labels(self, container_id: str, labels: dict[str, str]) -> None:
        """Sets labels of a container; others stay."""
        request = containers_pb2.UpdateContainerRequest(
            container=containers_pb2.Container(id=container_id, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{name}" for name in labels]),
        )
        self.call(self._containers.Update, request, f"labelling container {container_id}")

    def rewrite_container(self, container_id: str, *, labels: dict[str, str], spec: bytes) -> None:
        """Replaces the spec of a container without a task, and sets labels; others stay."""
        request = containers_pb2.UpdateContainerRequest(
            container=containers_pb2.Container(
                id=container_id, labels=labels, spec=Any(type_url=SPEC_TYPE_URL, value=spec)
            ),
            update_mask=FieldMask(paths=["spec", *(f"labels.{name}" for name in labels)]),
        )
        self.call(self._containers.Update, request, f"rewriting container {container_id}")

    def containers(self) -> list[containers_pb2.Container]:
        """Every container record of the namespace."""
        request = containers_pb2.ListContainersRequest()
        return list(self.call(self._containers.List, request, "listing containers").containers)

    def delete_container(self, container_id: str) -> None:
        """Deletes the record; an unknown one is fine."""
        request = containers_pb2.DeleteContainerRequest(id=container_id)
        self._delete(self._containers.Delete, request, f"container {container_id}")

    def create_task(
        self, container_id: str, mounts: list[types_pb2.Mount], *, timeout_s: float
    ) -> int:
        """Makes the task, without standard streams: the machine boots here. Answers its pid."""
        request = tasks_pb2.CreateTaskRequest(container_id=container_id, rootfs=mounts)
        tried = f"creating the task of {container_id}"
        return self.call(self._tasks.Create, request, tried, timeout_s=timeout_s).pid

    def start_task(self, container_id: str, *, timeout_s: float) -> None:
        """Starts the task; the shim answers when the container's init is up."""
        request = tasks_pb2.StartRequest(container_id=container_id)
        tried = f"starting the task of {container_id}"
        self.call(self._tasks.Start, request, tried, timeout_s=timeout_s)

    def wait_task(self, container_id: str) -> grpc.Future:
        """Opens a wait for the task's end; cancel the future when it is of no more use."""
        metadata = [("containerd-namespace", self.namespace)]
        request = tasks_pb2.WaitRequest(container_id=container_id)
        return self._tasks.Wait.future(request, metadata=metadata)

    def kill_task(self, container_id: str) -> None:
        """Sends SIGKILL to all of the task; an ended or unknown task is fine."""
        request = tasks_pb2.KillRequest(container_id=container_id, signal=9, all=True)
        self._delete(self._tasks.Kill, request, f"task {container_id}", timeout_s=10.0)

    def delete_task(self, container_id: str) -> None:
        """Deletes an ended task; an unknown one is fine."""
        request = tasks_pb2.DeleteTaskRequest(container_id=container_id)
        self._delete(self._tasks.Delete, request, f"task {container_id}")

    def checkpoint_task(self, container_id: str, options: bytes, *, timeout_s: float) -> None:
        """Has the shim save the task as `options` say (docs/architecture.md, "Saved sandboxes").

        containerd makes blobs of its own of it afterwards, which hold nothing and are removed: the
        same bytes each time, so it fails where an earlier call's, or another's, are still there.
        The shim has done its part then.
        """
        request = tasks_pb2.CheckpointTaskRequest(
            container_id=container_id, options=Any(type_url=CHECKPOINT_TYPE_URL, value=options)
        )
        tried = f"saving {container_id}"
        try:
            answer = self.call(self._tasks.Checkpoint, request, tried, timeout_s=timeout_s)
            digests = [row.digest for row in answer.descriptors]
        except VmcellError as error:
            present = _BLOB_EXISTS.search(str(error))
            if present is None:
                raise
            digests = [present[1]]
        for digest in digests:
            blob = content_pb2.DeleteContentRequest(digest=digest)
            self._delete(self._content.Delete, blob, f"blob {digest}")

    def resume_task(self, container_id: str) -> None:
        """Lets a paused task run on."""
        request = tasks_pb2.ResumeTaskRequest(container_id=container_id)
        self.call(self._tasks.Resume, request, f"resuming the task of {container_id}")

    def task_pids(self) -> dict[str, int]:
        """Every task of the namespace with the pid that containerd knows."""
        answer = self.call(self._tasks.List, tasks_pb2.ListTasksRequest(), "listing the tasks")
        return {task.id: task.pid for task in answer.tasks}

    def task_states(self) -> dict[str, int]:
        """Every task of the namespace with its types_pb2.Status."""
        request = tasks_pb2.ListTasksRequest()
        answer = self.call(self._tasks.List, request, "listing the tasks")
        # In a list the container's id stands in `id`; `container_id` is empty (containerd 1.6).
        return {task.id: task.status for task in answer.tasks}

    def _delete(
        self, method: Callable, request: object, what: str, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        try:
            self.call(method, request, f"removing {what}", timeout_s=timeout_s)
        except CallerError as error:
            if error.code != "not_found":
                raise

    def exits(self, stop: threading.Event) -> Iterator[tuple[str, int]]:
        """Container and pid of each init of this namespace that ended, as they end.

        First yields ("", 0) once the subscription stands. Ends when `stop` is set and the
        connection closes; raises HostError when the stream breaks.
        """
        expression = f'namespace=="{self.namespace}",topic=="{EXIT_TOPIC}"'
        stream = self._events.Subscribe(events_pb2.SubscribeRequest(filters=[expression]))
        try:
            yield "", 0
            for envelope in stream:
                event = events_pb2.TaskExit.FromString(envelope.event.value)
                if event.id == event.container_id:
                    yield event.container_id, event.pid
        except grpc.RpcError as error:
            if not stop.is_set():
                raise translate(error, "listening to containerd's events") from error
        finally:
            stream.cancel()
