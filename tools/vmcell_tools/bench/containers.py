"""Containers of a benchmark, through containerd's gRPC as a client makes them.

A container of vmcell's is booted, saved to a snapshot of this host, or restored from one; one of
any runtime runs a program beside its own. What is made is removed by `close`, whatever happened.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.any_pb2 import Any

from vmcell_api.node import oci_image
from vmcell_api.node.containerd import Containerd, translate
from vmcell_protos.errors import GuestError, HostError, VmcellError
from vmcell_protos.pb.containerd import tasks_pb2, tasks_pb2_grpc
from vmcell_shim.config import ShimConfig, load_config
from vmcell_shim.snapshot_store import remove_snapshot

VMCELL, RUNC = "io.containerd.vmcell.v2", "io.containerd.runc.v2"
CALL_TIMEOUT_S = 600.0
REMOVED_AT_ONCE = 4
PROCESS_TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
SNAPSHOT_ANNOTATION = "io.vmcell.snapshot"
MEMORY_ANNOTATION = "io.vmcell.memory-mib"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WAITING = ("/bin/sleep", "86400")
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which containerd, and an image with a shell in it."""

    address: str = "/run/containerd/containerd.sock"
    namespace: str = "default"
    snapshotter: str = "overlayfs"
    image: str = "docker.io/vmcell/small:latest"


class Containers:
    """Makes and removes containers named `<prefix>-…`. Thread-safe, but for one name at a time."""

    def __init__(self, target: Target, prefix: str) -> None:
        """Raises HostError when containerd does not answer, CallerError for an unknown image."""
        self._target = target
        self._prefix = f"bench-{prefix}-{os.getpid()}"
        self._made: set[str] = set()
        self._saved: set[str] = set()
        self._left: list[str] = []
        self.containerd = Containerd(
            target.address, namespace=target.namespace, snapshotter=target.snapshotter
        )
        try:
            self.chain_id = chain_id(self.containerd, target.image)
            self._spec = default_spec()
        except BaseException:
            self.containerd.close()
            raise
        self._tasks = self.containerd.stub(tasks_pb2_grpc.TasksStub)

    @property
    def config(self) -> ShimConfig:
        """The shim's own, as it reads it. HostError."""
        return load_config()

    @property
    def namespace(self) -> str:
        return self._target.namespace

    def name(self, suffix: object) -> str:
        """A container's or snapshot's name of this run."""
        return f"{self._prefix}-{suffix}"

    def start(
        self,
        name: str,
        runtime: str = VMCELL,
        *,
        annotations: Mapping[str, str] | None = None,
        words: Sequence[str] = WAITING,
    ) -> list[int]:
        """A started container; time.time_ns() before, and after each of its four steps: snapshot
        prepared, container recorded, task created, task started. Raises VmcellError."""
        self._made.add(name)
        lease = f"lease-{name}"
        self.containerd.create_lease(lease, {})
        marks = [time.time_ns()]
        mounts = self.containerd.prepare_snapshot(
            name, parent=self.chain_id, labels={}, lease=lease
        )
        marks.append(time.time_ns())
        self.containerd.create_container(
            name,
            image=self._target.image,
            labels={},
            runtime=runtime,
            spec=self._spec_of(name, annotations or {}, words),
            lease=lease,
        )
        marks.append(time.time_ns())
        self.containerd.create_task(name, mounts, timeout_s=CALL_TIMEOUT_S)
        marks.append(time.time_ns())
        self.containerd.start_task(name, timeout_s=CALL_TIMEOUT_S)
        marks.append(time.time_ns())
        return marks

    def save(self, name: str, snapshot_id: str, *, drop_caches: bool = True) -> None:
        """A snapshot of a running container of vmcell's, which goes on. Raises VmcellError."""
        self._saved.add(snapshot_id)
        options = {"snapshot_id": snapshot_id, "then": "run", "drop_caches": drop_caches}
        self.containerd.checkpoint_task(
            name, json.dumps(options).encode(), timeout_s=CALL_TIMEOUT_S
        )

    def restore(self, name: str, snapshot_id: str, memory_mib: int) -> list[int]:
        """A container that goes on from a snapshot; marks as of `start`. Raises VmcellError."""
        annotations = {SNAPSHOT_ANNOTATION: snapshot_id, MEMORY_ANNOTATION: str(memory_mib)}
        return self.start(name, annotations=annotations)

    def run_in(
        self,
        name: str,
        words: Sequence[str],
        exec_id: str,
        *,
        within_s: float = CALL_TIMEOUT_S,
    ) -> float:
        """Milliseconds from Exec sent to Wait answered; GuestError unless the program ends with 0.
        Its output goes nowhere. Each call has `within_s` seconds. Raises VmcellError."""
        process = {"args": list(words), "cwd": "/", "env": [PATH], "user": {"uid": 0, "gid": 0}}
        spec = Any(type_url=PROCESS_TYPE_URL, value=json.dumps(process).encode())
        began = time.perf_counter_ns()
        self._call(
            "Exec",
            tasks_pb2.ExecProcessRequest(container_id=name, exec_id=exec_id, spec=spec),
            within_s,
        )
        try:
            waiting = self._tasks.Wait.future(
                tasks_pb2.WaitRequest(container_id=name, exec_id=exec_id),
                timeout=within_s,
                metadata=[("containerd-namespace", self.namespace)],
            )
            self._call(
                "Start", tasks_pb2.StartRequest(container_id=name, exec_id=exec_id), within_s
            )
            try:
                status = waiting.result().exit_status
            except grpc.RpcError as error:
                raise translate(error, f"waiting for {words[0]} in {name}") from error
            ended = time.perf_counter_ns()
        finally:
            request = tasks_pb2.DeleteProcessRequest(container_id=name, exec_id=exec_id)
            self._call("DeleteProcess", request, within_s)
        if status:
            raise GuestError(f"{' '.join(words)} in {name} ended with {status}")
        return (ended - began) / 1e6

    def _call(self, method: str, request: object, within_s: float) -> None:
        tried = f"{method} of {getattr(request, 'exec_id', '')}"
        self.containerd.call(getattr(self._tasks, method), request, tried, timeout_s=within_s)

    def shim_log(self, name: str) -> str:
        """What the shim of a running container has written. HostError."""
        path = Path(self.config.state_dir, self.namespace, name, "shim.log")
        try:
            return path.read_text()
        except OSError as error:
            raise HostError(f"the log of {name} cannot be read: {error}") from error

    def remove(self, name: str) -> None:
        """The container is gone, whatever state it was in. Raises VmcellError."""
        if self.containerd.task_states().get(name) is not None:
            waiting = self.containerd.wait_task(name)
            self.containerd.kill_task(name)
            try:
                waiting.result(timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                raise translate(error, f"waiting for the end of {name}") from error
            except grpc.FutureTimeoutError as error:
                raise HostError(f"{name} did not end within {CALL_TIMEOUT_S:g} s") from error
        self.containerd.delete_task(name)
        self.containerd.delete_container(name)
        self.containerd.remove_snapshot(name)
        self.containerd.delete_lease(f"lease-{name}")
        self._made.discard(name)

    def remove_saved(self, snapshot_id: str) -> None:
        """The snapshot is gone. Raises VmcellError."""
        remove_snapshot(self.config.snapshot_dir, snapshot_id)
        self._saved.discard(snapshot_id)

    def allocated_bytes(self, snapshot_id: str) -> int:
        """What the files of a snapshot take on their disk. Raises OSError."""
        folder = Path(self.config.snapshot_dir, snapshot_id)
        return sum(512 * path.stat().st_blocks for path in folder.iterdir())

    def discard(self, name: str) -> None:
        """`remove`, and what keeps it from being removed is told by `close`."""
        try:
            self.remove(name)
        except VmcellError as error:
            self._made.discard(name)
            self._left.append(f"not removed: {error}")

    def close(self) -> list[str]:
        """Removes what is there; a sentence for each thing that is left. Idempotent."""
        with ThreadPoolExecutor(max_workers=REMOVED_AT_ONCE) as pool:
            list(pool.map(self.discard, sorted(self._made)))
        for snapshot_id in sorted(self._saved):
            try:
                self.remove_saved(snapshot_id)
            except VmcellError as error:
                self._saved.discard(snapshot_id)
                self._left.append(f"not removed: {error}")
        self.containerd.close()
        left, self._left = self._left, []
        return left

    def _spec_of(self, name: str, annotations: Mapping[str, str], words: Sequence[str]) -> bytes:
        spec = json.loads(json.dumps(self._spec))
        spec["process"]["args"] = list(words)
        spec["annotations"] = dict(annotations)
        spec["linux"]["cgroupsPath"] = f"/{self.namespace}/{name}"
        return json.dumps(spec).encode()


@contextmanager
def opened(target: Target, prefix: str, notes: list[str]) -> Iterator[Containers]:
    """Containers that are removed at the end; what could not be is added to `notes`."""
    containers = Containers(target, prefix)
    try:
        yield containers
    finally:
        notes += containers.close()


def chain_id(containerd: Containerd, image: str) -> str:
    """The committed snapshot with all layers of `image`. CallerError for an unknown one."""
    target = containerd.image_target(image)
    manifest = target.digest
    data = containerd.read_blob(manifest)
    if target.media_type in oci_image.INDEX_TYPES:
        manifest = oci_image.manifest_digest(data, image)
        data = containerd.read_blob(manifest)
    config = containerd.read_blob(oci_image.config_digest(data, image))
    return oci_image.parse_config(config, image).chain_id


def default_spec() -> dict[str, typing.Any]:
    """What `ctr run` gives a container, without a terminal, and /dev/shm without a limit of its
    own. HostError without ctr."""
    try:
        text = subprocess.run(["ctr", "oci", "spec"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"ctr oci spec failed: {error}; is containerd installed?") from error
    spec = json.loads(text)
    spec["process"]["terminal"] = False
    spec["linux"].pop("seccomp", None)
    for mount in spec["mounts"]:
        if mount["destination"] == SHARED_MEMORY:
            mount["options"] = [row for row in mount["options"] if not row.startswith("size=")]
    return spec
