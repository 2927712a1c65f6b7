"""A pod's sandbox container: in containerd's eyes a task, here the pod's microVM itself.

Its image holds a program that waits for ever to keep namespaces alive; the VM does that, so no
image is made and no process runs. The task ends when it is signalled or when the VM ends, and takes
the pod along. Source: containerd pkg/cri/server (sandbox_run.go); pause.c ends with 0 on SIGTERM.
"""

from __future__ import annotations

import signal as signals
import threading
import time

from vmcell_protos.errors import CallerError
from vmcell_protos.events import TaskStart
from vmcell_shim.container import Container
from vmcell_shim.process import KILLED_STATUS
from vmcell_shim.spec import plan_pod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import ContainerStatsResponse
    from vmcell_protos.task import ExecProcessRequest
    from vmcell_shim.oci_json import Json
    from vmcell_shim.process import Process

# The others do nothing to a program that waits.
_STATUS_BY_SIGNAL = {signals.SIGKILL: KILLED_STATUS, signals.SIGTERM: 0, signals.SIGINT: 0}


class PauseContainer(Container):
    """The same calls and events as any container's; the guest is never asked for it."""

    def _make(self, spec: Json, deadline: float) -> None:
        plan = plan_pod(
            spec,
            default_vcpus=self._config.default_vcpus,
            default_memory_mib=self._config.default_memory_mib,
        )
        self._footprint.open(self.bundle)
        deadline = min(deadline, time.monotonic() + self._config.boot_timeout_s)
        self.sandbox.boot(plan, spec, self.bundle, None, deadline)

    def start(self, process: Process) -> int:
        process.advance("start")
        process.advance("started")
        self._journal.info(f"pod {self.id} started")
        self._events.publish(TaskStart(container_id=self.id, pid=self.guest.pid))
        if self.guest.ended.is_set():
            self.vm_ended()
        return self.guest.pid

    def vm_ended(self) -> None:
        self._finish(self.init, KILLED_STATUS)

    def _signal(self, process: Process, signal: int, *, everyone: bool) -> None:
        status = _STATUS_BY_SIGNAL.get(signals.Signals(signal)) if signal else None
        if status is not None:
            self._finish(process, status)

    def _finish(self, process: Process, status: int) -> None:
        super()._finish(process, status)
        # A pod whose sandbox has ended is over for everybody in it.
        threading.Thread(target=self.guest.kill, name="end-pod", daemon=True).start()

    def add_exec(self, request: ExecProcessRequest) -> None:
        raise CallerError(
            f"cannot run {request.exec_id} in {self.id}: the pod's sandbox container has no file "
            "system; run it in one of the pod's containers",
            code="failed_precondition",
        )

    def pause(self) -> None:
        raise CallerError(
            f"cannot pause {self.id}: it is a pod's sandbox container and runs nothing",
            code="failed_precondition",
        )

    def update(self, resources: bytes) -> None:
        """The pod's own limits are those of its microVM, which was booted with them."""
        self.init.advance("update")

    def stats(self) -> ContainerStatsResponse:
        raise CallerError(f"task {self.id} runs nothing that has numbers", code="not_found")
