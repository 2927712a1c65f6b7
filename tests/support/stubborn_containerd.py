"""containerd's tasks as a client uses them that outlives the daemon: calls are repeated until one
is answered, and an answer that a lost call has changed something already counts as success.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from vmcell_api.node.containerd import Containerd, translate
from vmcell_api.node.oci_image import config_digest, manifest_digest, parse_config
from vmcell_protos.errors import VmcellError
from vmcell_protos.pb.containerd import snapshots_pb2, snapshots_pb2_grpc
from vmcell_protos.task import TaskStatus_CREATED, TaskStatus_RUNNING, TaskStatus_STOPPED
from vmcell_protos.wellknown import Any, Empty
from vmcell_protos.wire import Field, Message

T = TypeVar("T")
M = TypeVar("M", bound=Message)

PROCESS_TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
TASKS = "/containerd.services.tasks.v1.Tasks/"
CALL_S = 300.0
PAUSE_S = 0.2
MOST_STRIKES = 10
# The daemon is away, or was cut off in the middle of a call.
AWAY = ("unavailable", "canceled", "unknown", "deadline_exceeded")


class ProcessRequest(Message):
    """StartRequest, GetRequest, WaitRequest and DeleteProcessRequest of tasks.proto: they agree."""

    __slots__ = ("container_id", "exec_id")
    FIELDS = (Field(1, "container_id", "string"), Field(2, "exec_id", "string"))

    def __init__(self, *, container_id: str = "", exec_id: str = "") -> None:
        self.container_id, self.exec_id = container_id, exec_id


class ExecRequest(Message):
    __slots__ = ("container_id", "exec_id", "spec", "stderr", "stdin", "stdout")
    FIELDS = (
        Field(1, "container_id", "string"),
        Field(2, "stdin", "string"),
        Field(3, "stdout", "string"),
        Field(4, "stderr", "string"),
        Field(6, "spec", "message", "one", Any),
        Field(7, "exec_id", "string"),
    )

    def __init__(
        self,
        *,
        container_id: str = "",
        exec_id: str = "",
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        spec: Any | None = None,
    ) -> None:
        self.container_id, self.exec_id = container_id, exec_id
        self.stdin, self.stdout, self.stderr, self.spec = stdin, stdout, stderr, spec


class WaitResponse(Message):
    __slots__ = ("exit_status",)
    FIELDS = (Field(1, "exit_status", "uint32"),)

    def __init__(self, *, exit_status: int = 0) -> None:
        self.exit_status = exit_status


class Process(Message):
    __slots__ = ("exit_status", "status")
    FIELDS = (Field(4, "status", "uint32"), Field(9, "exit_status", "uint32"))

    def __init__(self, *, status: int = 0, exit_status: int = 0) -> None:
        self.status, self.exit_status = status, exit_status


class GetResponse(Message):
    __slots__ = ("process",)
    FIELDS = (Field(1, "process", "message", "one", Process),)

    def __init__(self, *, process: Process | None = None) -> None:
        self.process = process


class StubbornContainerd:
    """Thread-safe. Every call ends within CALL_S, or raises what it met last."""

    def __init__(self, socket_path: str, *, namespace: str, snapshotter: str, runtime: str) -> None:
        self._daemon = Containerd(socket_path, namespace=namespace, snapshotter=snapshotter)
        self._channel = grpc.insecure_channel(
            f"unix://{socket_path}",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(self._channel)
        self._snapshotter = snapshotter
        self._metadata = [("containerd-namespace", namespace)]
        self._runtime = runtime
        self.repeated = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        self._channel.close()
        self._daemon.close()

    def insist(self, call: Callable[[], T], *, done: tuple[str, ...] = ()) -> T | None:
        """What `call` returns at last; None when it ends with a code of `done`."""
        end = time.monotonic() + CALL_S
        strikes = 0
        while True:
            try:
                return call()
            except VmcellError as error:
                if error.code in done:
                    return None
                # A shim that cannot do it says unavailable too, to a daemon that is there.
                strikes += self._is_there()
                if error.code not in AWAY or strikes > MOST_STRIKES or time.monotonic() > end:
                    raise
            with self._lock:
                self.repeated += 1
            time.sleep(PAUSE_S)

    def _is_there(self) -> bool:
        try:
            return bool(self._daemon.version())
        except VmcellError:
            return False

    def version(self) -> str | None:
        return self.insist(self._daemon.version)

    def chain_id(self, image: str) -> str:
        """The snapshot that an image of one manifest is unpacked to."""
        index = self._daemon.read_blob(self._daemon.image_target(image).digest)
        try:
            manifest = self._daemon.read_blob(manifest_digest(index, image))
        except VmcellError:
            # The target is the manifest itself.
            manifest = index
        config = self._daemon.read_blob(config_digest(manifest, image))
        return parse_config(config, image).chain_id

    def make(self, name: str, *, chain_id: str, image: str, spec: dict[str, object]) -> None:
        """Snapshot, container and task: created, not started."""
        labels = {"containerd.io/gc.root": "2020-01-01T00:00:00Z"}
        taken = ("already_exists",)
        self.insist(
            lambda: self._daemon.prepare_snapshot(name, parent=chain_id, labels=labels, lease=""),
            done=taken,
        )
        data = json.dumps(spec).encode()
        self.insist(
            lambda: self._daemon.create_container(
                name, image=image, labels={}, runtime=self._runtime, spec=data, lease=""
            ),
            done=taken,
        )
        end = time.monotonic() + CALL_S
        while self.insist(lambda: self._create_task(name), done=taken) is None:
            # A call that was cut off made it, or makes it still.
            if self.state(name) == TaskStatus_CREATED:
                return
            assert time.monotonic() < end, f"{name} is neither created nor gone"
            self.delete_task(name)

    def _create_task(self, name: str) -> bool:
        request = snapshots_pb2.MountsRequest(snapshotter=self._snapshotter, key=name)
        try:
            answer = self._snapshots.Mounts(request, timeout=CALL_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise translate(error, f"mounts of {name}") from error
        self._daemon.create_task(name, list(answer.mounts), timeout_s=CALL_S)
        return True

    def start(self, name: str, exec_id: str = "") -> None:
        request = ProcessRequest(container_id=name, exec_id=exec_id)
        end = time.monotonic() + CALL_S
        while (
            self.insist(lambda: self._call("Start", request, Empty), done=("failed_precondition",))
            is None
        ):
            if self.state(name, exec_id) in (TaskStatus_RUNNING, TaskStatus_STOPPED):
                return
            # Created by a call that was cut off, and not yet ready to be started.
            assert time.monotonic() < end, f"{name} {exec_id} does not start"
            time.sleep(PAUSE_S)

    def add_exec(
        self, name: str, exec_id: str, args: list[str], *, stdin: str = "", stdout: str = ""
    ) -> None:
        process = {"args": args, "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {}}
        request = ExecRequest(
            container_id=name,
            exec_id=exec_id,
            stdin=stdin,
            stdout=stdout,
            spec=Any(type_url=PROCESS_TYPE_URL, value=json.dumps(process).encode()),
        )
        self.insist(lambda: self._call("Exec", request, Empty), done=("already_exists",))

    def state(self, name: str, exec_id: str = "") -> int:
        """A TaskStatus; 0 for a process that is not known."""
        request = ProcessRequest(container_id=name, exec_id=exec_id)
        answer = self.insist(lambda: self._call("Get", request, GetResponse), done=("not_found",))
        return answer.process.status if answer and answer.process else 0

    def wait(self, name: str, exec_id: str = "") -> int:
        """The exit status."""
        request = ProcessRequest(container_id=name, exec_id=exec_id)
        answer = self.insist(lambda: self._call("Wait", request, WaitResponse))
        assert answer is not None
        return answer.exit_status

    def kill(self, name: str) -> None:
        self.insist(lambda: self._daemon.kill_task(name))

    def delete_exec(self, name: str, exec_id: str) -> None:
        request = ProcessRequest(container_id=name, exec_id=exec_id)
        self.insist(lambda: self._call("DeleteProcess", request, Empty), done=("not_found",))

    def delete_task(self, name: str) -> None:
        """Whatever its state."""
        end = time.monotonic() + CALL_S
        while True:
            self.kill(name)
            gone = self.insist(
                lambda: self._deleted(name), done=("failed_precondition", "internal")
            )
            if gone:
                return
            assert time.monotonic() < end, f"the task of {name} cannot be deleted"
            time.sleep(PAUSE_S)

    def _deleted(self, name: str) -> bool:
        self._daemon.delete_task(name)
        return True

    def remove(self, name: str) -> None:
        self.delete_task(name)
        self.insist(lambda: self._daemon.delete_container(name))
        self.insist(lambda: self._daemon.remove_snapshot(name))

    def _call(self, method: str, request: Message, answer: type[M]) -> M:
        call = self._channel.unary_unary(
            TASKS + method,
            request_serializer=lambda message: message.encode(),
            response_deserializer=answer.decode,
        )
        try:
            reply: M = call(request, timeout=CALL_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise translate(error, f"{method} of {request}") from error
        return reply
