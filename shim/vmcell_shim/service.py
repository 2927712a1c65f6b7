"""containerd's Task service, v2 and v3: which call does what, and what it answers.

The two versions have the same messages. Calls come on many connections at once; State, Connect,
Pids and Wait never wait for a guest. What a microVM of this version cannot do answers
`unimplemented` with a sentence. Source: containerd api/runtime/task/v3/shim.proto, and
reference shim-contract 2.2 for what containerd sends when.
"""

from __future__ import annotations

import os
import threading
import time

from vmcell_protos import task
from vmcell_protos.agent import ContainerRef, ContainerStatsResponse
from vmcell_protos.errors import CallerError
from vmcell_protos.wellknown import Any, Empty
from vmcell_shim.config import load_config
from vmcell_shim.container import Container
from vmcell_shim.events import EventPublisher, timestamp
from vmcell_shim.lifecycle import CREATING, STATUS, STOPPED
from vmcell_shim.metrics import metrics_of
from vmcell_shim.sandbox_files import SandboxFiles

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.wire import Message
    from vmcell_shim.journal import Journal
    from vmcell_shim.process import Process

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
_STATS_ANSWER_S = 10.0
_DETAILS_TYPE = "containerd.runc.v1.ProcessDetails"

_ABSENT = {
    "Pause": "pausing a microVM",
    "Resume": "resuming a microVM",
    "Checkpoint": "checkpoints",
    "Update": "changing the limits of a running microVM",
}


class TaskService:
    """All containers of one shim process (of this version: one). `idle` runs when a Shutdown found
    nothing left."""

    def __init__(
        self, namespace: str, events: EventPublisher, journal: Journal, idle: Callable[[], None]
    ) -> None:
        self._namespace = namespace
        self._events = events
        self._journal = journal
        self._idle = idle
        self._lock = threading.Lock()
        self._containers: dict[str, Container] = {}
        self._methods: dict[str, Callable[[bytes, int], Message]] = {
            name: getattr(self, f"_{name.lower()}") for name in METHODS
        }

    def handle(self, service: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        """One call: bytes of the answer. Raises VmcellError."""
        if service not in SERVICES:
            raise CallerError(f"service {service} is not offered", code="unimplemented")
        if method in _ABSENT:
            raise CallerError(
                f"{_ABSENT[method]} ({method}) is not in this version of vmcell",
                code="unimplemented",
            )
        function = self._methods.get(method)
        if function is None:
            raise CallerError(f"{service} has no method {method}", code="unimplemented")
        return function(payload, timeout_ns).encode()

    @property
    def has_containers(self) -> bool:
        return bool(self._containers)

    def _container(self, container_id: str) -> Container:
        with self._lock:
            container = self._containers.get(container_id)
        if container is None:
            raise CallerError(f"task {container_id} does not exist", code="not_found")
        return container

    def _process(self, container_id: str, exec_id: str) -> Process:
        return self._container(container_id).process(exec_id)

    def _create(self, payload: bytes, timeout_ns: int) -> Message:
        request = task.CreateTaskRequest.decode(payload)
        config = load_config()
        timeout_s = timeout_ns / 1e9 if timeout_ns > 0 else float("inf")
        names = (self._namespace, request.id)
        container = self._register(
            request.id,
            lambda: Container(
                request,
                namespace=self._namespace,
                config=config,
                files=SandboxFiles(os.path.join(config.state_dir, *names)),
                own_dir=os.path.join(config.cache_dir, "sandboxes", *names),
                events=self._events,
                journal=self._journal,
            ),
        )
        created = False
        try:
            pid = container.create(time.monotonic() + timeout_s)
            created = True
        finally:
            if not created:
                self._unregister(request.id)
        return task.CreateTaskResponse(pid=pid)

    def _register(self, container_id: str, make: Callable[[], Container]) -> Container:
        with self._lock:
            if container_id in self._containers:
                raise CallerError(f"task {container_id} exists already", code="already_exists")
            if self._containers:
                others = ", ".join(self._containers)
                raise CallerError(
                    f"this shim's microVM belongs to {others}; more than one container in a "
                    "microVM (a pod) is not in this version of vmcell",
                    code="unimplemented",
                )
            container = self._containers[container_id] = make()
            return container

    def _unregister(self, container_id: str) -> None:
        with self._lock:
            del self._containers[container_id]

    def _start(self, payload: bytes, _: int) -> Message:
        request = task.StartRequest.decode(payload)
        container = self._container(request.id)
        return task.StartResponse(pid=container.start(container.process(request.exec_id)))

    def _exec(self, payload: bytes, _: int) -> Message:
        request = task.ExecProcessRequest.decode(payload)
        if not request.exec_id:
            raise CallerError(f"an exec in task {request.id} needs an exec_id")
        self._container(request.id).add_exec(request)
        return Empty()

    def _state(self, payload: bytes, _: int) -> Message:
        request = task.StateRequest.decode(payload)
        container = self._container(request.id)
        process = container.process(request.exec_id)
        return task.StateResponse(
            id=request.id,
            bundle=container.bundle,
            pid=container.guest.pid,
            status=STATUS[process.state],
            stdin=process.stdio.stdin_path,
            stdout=process.stdio.stdout_path,
            stderr=process.stdio.stderr_path,
            terminal=process.stdio.terminal,
            exit_status=process.exit_status,
            exited_at=timestamp(process.exited_at_ns) if process.exited_at_ns else None,
            exec_id=process.exec_id,
        )

    def _delete(self, payload: bytes, _: int) -> Message:
        request = task.DeleteRequest.decode(payload)
        container = self._container(request.id)
        process = container.process(request.exec_id)
        container.delete(process)
        if not request.exec_id:
            self._unregister(request.id)
        return task.DeleteResponse(
            pid=container.guest.pid,
            exit_status=process.exit_status,
            exited_at=timestamp(process.exited_at_ns),
        )

    def _wait(self, payload: bytes, _: int) -> Message:
        request = task.WaitRequest.decode(payload)
        process = self._process(request.id, request.exec_id)
        process.wait_ended(None)
        return task.WaitResponse(
            exit_status=process.exit_status, exited_at=timestamp(process.exited_at_ns)
        )

    def _kill(self, payload: bytes, _: int) -> Message:
        request = task.KillRequest.decode(payload)
        container = self._container(request.id)
        process = container.process(request.exec_id)
        container.kill(process, request.signal, everyone=request.all)
        return Empty()

    def _resizepty(self, payload: bytes, _: int) -> Message:
        request = task.ResizePtyRequest.decode(payload)
        container = self._container(request.id)
        process = container.process(request.exec_id)
        container.resize(process, request.width, request.height)
        return Empty()

    def _closeio(self, payload: bytes, _: int) -> Message:
        request = task.CloseIORequest.decode(payload)
        process = self._process(request.id, request.exec_id)
        if request.stdin:
            process.stdio.end_input()
        return Empty()

    def _pids(self, payload: bytes, _: int) -> Message:
        """Never empty: containerd takes a shim without pids for a leaked one after its restart."""
        request = task.PidsRequest.decode(payload)
        container = self._container(request.id)
        rows = []
        for process in container.processes():
            info = None
            if process.exec_id:
                if process.state == STOPPED:
                    continue
                details = task.ProcessDetails(exec_id=process.exec_id)
                info = Any(type_url=_DETAILS_TYPE, value=details.encode())
            rows.append(task.ProcessInfo(pid=container.guest.pid or os.getpid(), info=info))
        return task.PidsResponse(processes=rows)

    def _stats(self, payload: bytes, _: int) -> Message:
        request = task.StatsRequest.decode(payload)
        container = self._container(request.id)
        container.init.advance("stats")
        stats = container.guest.call(
            "ContainerStats",
            ContainerRef(container_id=request.id),
            ContainerStatsResponse,
            _STATS_ANSWER_S,
        )
        return task.StatsResponse(stats=metrics_of(stats))

    def _connect(self, payload: bytes, _: int) -> Message:
        request = task.ConnectRequest.decode(payload)
        with self._lock:
            container = self._containers.get(request.id)
        pid = container.guest.pid if container and container.init.state != CREATING else 0
        return task.ConnectResponse(shim_pid=os.getpid(), task_pid=pid)

    def _shutdown(self, payload: bytes, _: int) -> Message:
        task.ShutdownRequest.decode(payload)
        if not self.has_containers:
            self._idle()
        return Empty()


METHODS = (
    "Create",
    "Start",
    "Exec",
    "State",
    "Delete",
    "Wait",
    "Kill",
    "ResizePty",
    "CloseIO",
    "Pids",
    "Stats",
    "Connect",
    "Shutdown",
)
