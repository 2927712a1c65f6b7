"""containerd's Task service, v2 and v3: which call does what, and what it answers.

The two versions have the same messages. Calls come on many connections at once; State, Connect,
Pids and Wait never wait for a guest. What a microVM of this version cannot do answers
`unimplemented` with a sentence. Source: containerd api/runtime/task/v3/shim.proto, and
reference shim-contract 2.2 for what containerd sends when.
"""

from __future__ import annotations

import os
import time

from vmcell_protos import task
from vmcell_protos.errors import CallerError
from vmcell_protos.wellknown import Any, Empty
from vmcell_shim.checkpoint import parse_options
from vmcell_shim.config import load_config
from vmcell_shim.events import timestamp
from vmcell_shim.lifecycle import CREATING, STATUS, STOPPED
from vmcell_shim.metrics import metrics_of
from vmcell_shim.saving import save_container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.wire import Message
    from vmcell_shim.process import Process
    from vmcell_shim.registry import Registry

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
_RESOURCES_TYPE = "opencontainers/runtime-spec/1/LinuxResources"
_DETAILS_TYPE = "containerd.runc.v1.ProcessDetails"


class TaskService:
    """The tasks of one shim process. `idle` runs when a Shutdown found nothing left."""

    def __init__(self, registry: Registry, idle: Callable[[], None]) -> None:
        self._registry = registry
        self._idle = idle
        self._leaves_with_last = False
        self._methods: dict[str, Callable[[bytes, int], Message]] = {
            name: getattr(self, f"_{name.lower()}") for name in METHODS
        }

    def handle(self, service: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        """One call: bytes of the answer. Raises VmcellError."""
        function = self._methods.get(method)
        if function is None:
            raise CallerError(f"{service} has no method {method}", code="unimplemented")
        return function(payload, timeout_ns).encode()

    def _process(self, container_id: str, exec_id: str) -> Process:
        return self._registry.container(container_id).process(exec_id)

    def _create(self, payload: bytes, timeout_ns: int) -> Message:
        request = task.CreateTaskRequest.decode(payload)
        timeout_s = timeout_ns / 1e9 if timeout_ns > 0 else float("inf")
        container = self._registry.add(request)
        try:
            pid = container.create(time.monotonic() + timeout_s)
        except BaseException:
            self._registry.give_up(container)
            raise
        return task.CreateTaskResponse(pid=pid)

    def _start(self, payload: bytes, _: int) -> Message:
        request = task.StartRequest.decode(payload)
        container = self._registry.container(request.id)
        return task.StartResponse(pid=container.start(container.process(request.exec_id)))

    def _exec(self, payload: bytes, _: int) -> Message:
        request = task.ExecProcessRequest.decode(payload)
        if not request.exec_id:
            raise CallerError(f"an exec in task {request.id} needs an exec_id")
        self._registry.container(request.id).add_exec(request)
        return Empty()

    def _state(self, payload: bytes, _: int) -> Message:
        request = task.StateRequest.decode(payload)
        container = self._registry.container(request.id)
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
        container = self._registry.container(request.id)
        process = container.process(request.exec_id)
        container.delete(process)
        if not request.exec_id:
            self._registry.remove(container)
            if self._leaves_with_last and not self._registry.in_use:
                self._idle()
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
        container = self._registry.container(request.id)
        process = container.process(request.exec_id)
        container.kill(process, request.signal, everyone=request.all)
        return Empty()

    def _resizepty(self, payload: bytes, _: int) -> Message:
        request = task.ResizePtyRequest.decode(payload)
        container = self._registry.container(request.id)
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
        container = self._registry.container(request.id)
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
        stats = self._registry.container(request.id).stats()
        return task.StatsResponse(stats=metrics_of(stats))

    def _pause(self, payload: bytes, _: int) -> Message:
        self._registry.container(task.PauseRequest.decode(payload).id).pause()
        return Empty()

    def _resume(self, payload: bytes, _: int) -> Message:
        self._registry.container(task.ResumeRequest.decode(payload).id).resume()
        return Empty()

    def _update(self, payload: bytes, _: int) -> Message:
        request = task.UpdateTaskRequest.decode(payload)
        container = self._registry.container(request.id)
        resources = request.resources
        if resources is None or not resources.type_url.endswith(_RESOURCES_TYPE):
            kind = resources.type_url if resources else "nothing"
            raise CallerError(f"Update brings {kind[:100]!r}; it takes {_RESOURCES_TYPE} as JSON")
        container.update(resources.value)
        return Empty()

    def _checkpoint(self, payload: bytes, _: int) -> Message:
        request = task.CheckpointTaskRequest.decode(payload)
        options = parse_options(request.options)
        container = self._registry.container(request.id)
        save_container(container, options, request.path, load_config(), self._registry.journal)
        return Empty()

    def _connect(self, payload: bytes, _: int) -> Message:
        request = task.ConnectRequest.decode(payload)
        container = self._registry.find(request.id)
        pid = container.guest.pid if container and container.init.state != CREATING else 0
        return task.ConnectResponse(shim_pid=os.getpid(), task_pid=pid)

    def _shutdown(self, payload: bytes, _: int) -> Message:
        request = task.ShutdownRequest.decode(payload)
        members = self._registry.containers()
        if not self._registry.in_use:
            self._idle()
        elif members and all(row.sandbox.id == request.id != row.id for row in members):
            # The sandbox container was deleted before its members, as after the VM's death;
            # containerd 2.x does not ask again when they are.
            self._leaves_with_last = True
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
    "Pause",
    "Resume",
    "Update",
    "Checkpoint",
    "Connect",
    "Shutdown",
)
