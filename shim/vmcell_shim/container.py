"""One container in one microVM: made, started, watched, ended, removed.

Who ends what: each started process has a thread that waits for the guest's word of its end; when
the VM is gone these waits fail and the process has ended with 137. A process that was never started
is ended by whoever notices that the VM is gone. So a start event always stands before its exit.
"""

from __future__ import annotations

import itertools
import os
import threading
import time

from vmcell_protos.agent import (
    AddProcessRequest,
    CreateContainerRequest,
    ProcessRef,
    ResizePtyRequest,
    Rootfs,
    SignalProcessRequest,
    StartProcessResponse,
    WaitProcessResponse,
)
from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_protos.events import (
    TaskCreate,
    TaskDelete,
    TaskExecAdded,
    TaskExecStarted,
    TaskExit,
    TaskIO,
    TaskStart,
)
from vmcell_protos.wellknown import Empty
from vmcell_shim.client import ConnectionLost
from vmcell_shim.events import timestamp
from vmcell_shim.guest import LOWER_DEVICE, UPPER_DEVICE, Guest, GuestShape
from vmcell_shim.lifecycle import CREATED, CREATING, RUNNING
from vmcell_shim.living import identify
from vmcell_shim.oci_json import read_object
from vmcell_shim.process import KILLED_STATUS, SIGKILL, Process
from vmcell_shim.rootfs import RootImages, RootSource, parse_mounts, prepare_root
from vmcell_shim.spec import GuestPlan, plan_guest
from vmcell_shim.stdio import Stdio, StreamOwner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.task import CreateTaskRequest, ExecProcessRequest
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.events import EventPublisher
    from vmcell_shim.journal import Journal
    from vmcell_shim.sandbox_files import SandboxFiles

# What a shell answers for a program it cannot run.
NOT_STARTED_STATUS = 127
# Signals whose default is to do nothing (signal(7)), and the null signal.
_HARMLESS_SIGNALS = (0, 17, 18, 23, 28)
_LAST_SIGNAL = 64
_KILL_ANSWER_S = 5.0
_EXECS_END_S = 2.0


class Container:
    """Owns the guest, the streams and the sandbox's files until delete() or a failed create()."""

    def __init__(
        self,
        request: CreateTaskRequest,
        *,
        namespace: str,
        config: ShimConfig,
        files: SandboxFiles,
        own_dir: str,
        events: EventPublisher,
        journal: Journal,
    ) -> None:
        """Opens the request's streams; raises CallerError."""
        self.id = request.id
        self.bundle = request.bundle
        self._request = request
        self._config = config
        self._files = files
        self._own_dir = own_dir
        self._events = events
        self._journal = journal
        self._lock = threading.Lock()
        self._stream_ids = itertools.count(1)
        self._saves_writes = False
        self._owner = StreamOwner(
            namespace=namespace, container_id=request.id, warn=journal.warning
        )
        self.guest = Guest(journal, self._vm_ended)
        stdio = Stdio(
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            terminal=request.terminal,
            owner=self._owner,
        )
        self.init = Process(self.id, "", stdio)
        self._processes: dict[str, Process] = {"": self.init}

    # ---- making -------------------------------------------------------------------------------

    def create(self, deadline: float) -> int:
        """Boots the VM and makes the container in it; returns the pid to report.

        `deadline` in time.monotonic() seconds is the client's; the boot has one of its own, which
        begins when the images are there. After an error nothing of it is left.
        """
        try:
            self._make(deadline)
        except BaseException as error:
            # A bug of ours too must not leave a microVM that nobody owns.
            self._journal.error(f"{self.id} not created: {error!r}")
            self._give_up()
            if isinstance(error, OSError):
                raise HostError(f"cannot create {self.id}: {error}") from error
            raise
        request = self._request
        io = TaskIO(
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            terminal=request.terminal,
        )
        self._events.publish(
            TaskCreate(
                container_id=self.id,
                bundle=self.bundle,
                rootfs=request.rootfs,
                io=io,
                pid=self.guest.pid,
            )
        )
        # Only now: a VM that ends from here on has a task whose exit is told after its creation.
        self.init.advance("created")
        if self.guest.ended.is_set():
            self._vm_ended()
        return self.guest.pid

    def _make(self, deadline: float) -> None:
        if self._request.checkpoint:
            raise CallerError(
                "restoring from a checkpoint is not in this version of vmcell", code="unimplemented"
            )
        spec = read_object(os.path.join(self.bundle, "config.json"))
        config = self._config
        plan = plan_guest(
            spec,
            default_vcpus=config.default_vcpus,
            default_memory_mib=config.default_memory_mib,
        )
        source = parse_mounts(self._request.rootfs, plan.root_path, plan.read_only_root)
        self._files.log_dir = config.log_dir
        self._files.owned = [self._own_dir]
        self._files.shim = identify(os.getpid())
        self._files.create(self.bundle)
        self._journal.attach(self._files.shim_log)
        self._journal.info(
            f"creating {self.id}: {plan.size.vcpus} vCPUs, {plan.size.memory_mib} MiB"
        )
        images = self._images(source)
        self._journal.info(f"root image {images.image}, disk {images.disk or 'none'}")
        self._saves_writes = bool(images.disk and source.snapshot_dir)
        deadline = min(deadline, time.monotonic() + config.boot_timeout_s)
        if deadline <= time.monotonic():
            raise HostError(
                "the client gave up while the root image was made; it is kept, so try again",
                code="deadline_exceeded",
            )
        hello = self.guest.boot(self._shape(plan, images), deadline, self._record_vmm)
        self._journal.info(f"guest {hello.kernel_release} ready, agent {hello.agent_version}")
        request = CreateContainerRequest(
            container_id=self.id,
            spec_json=plan.spec_json,
            rootfs=Rootfs(
                lower_devices=[LOWER_DEVICE], upper_device=UPPER_DEVICE if images.disk else ""
            ),
            streams=self.init.stdio.declare(self._next_stream_id),
            files=list(plan.files),
            init=plan.init,
        )
        self.guest.call("CreateContainer", request, Empty, deadline - time.monotonic())

    def _images(self, source: RootSource) -> RootImages:
        return prepare_root(
            source,
            cache_dir=self._config.cache_dir,
            own_dir=self._own_dir,
            writable_mib=self._config.writable_mib,
        )

    def _shape(self, plan: GuestPlan, images: RootImages) -> GuestShape:
        return GuestShape(
            kernel=self._config.kernel,
            base_image=self._config.base_image,
            root_image=images.image,
            disk=images.disk,
            vcpus=plan.size.vcpus,
            memory_mib=plan.size.memory_mib,
            network=plan.network,
            hostname=plan.hostname,
            console_log=self._files.console_log,
            vmm_log=self._files.vmm_log,
        )

    def _record_vmm(self, pid: int) -> None:
        try:
            self._files.vmm = identify(pid)
            self._files.save()
        except (OSError, ProcessLookupError) as error:
            raise HostError(f"cannot note the VMM {pid} in the state file: {error}") from error

    def _give_up(self) -> None:
        """Undoes a creation; what cannot be undone is logged, the first error is the user's."""
        self.init.finish(KILLED_STATUS, lambda: None)
        self.init.stdio.close()
        for step in (self.guest.close, self._files.remove):
            try:
                step()
            except HostError as error:
                self._journal.error(f"after the failed creation of {self.id}: {error}")

    # ---- processes ----------------------------------------------------------------------------

    def process(self, exec_id: str) -> Process:
        """The init ("") or an exec; raises CallerError(not_found)."""
        with self._lock:
            process = self._processes.get(exec_id)
        if process is None:
            raise CallerError(f"exec {exec_id} of task {self.id} does not exist", code="not_found")
        return process

    def processes(self) -> list[Process]:
        with self._lock:
            return list(self._processes.values())

    def add_exec(self, request: ExecProcessRequest) -> None:
        """Adds a process that start() runs. Raises CallerError, or what the agent says."""
        self.init.advance("add_exec")
        stdio = Stdio(
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            terminal=request.terminal,
            owner=self._owner,
        )
        process = Process(self.id, request.exec_id, stdio)
        with self._lock:
            taken = request.exec_id in self._processes
            if not taken:
                self._processes[request.exec_id] = process
        if taken:
            stdio.close()
            raise CallerError(f"exec {request.exec_id} exists already", code="already_exists")
        try:
            message = AddProcessRequest(
                container_id=self.id,
                exec_id=request.exec_id,
                process_json=request.spec.value if request.spec else b"",
                streams=stdio.declare(self._next_stream_id),
            )
            self.guest.call("AddProcess", message, Empty, self._config.boot_timeout_s)
            process.advance("created")
        except BaseException:
            self._forget(process)
            raise
        self._events.publish(TaskExecAdded(container_id=self.id, exec_id=request.exec_id))

    def start(self, process: Process) -> int:
        """Runs a created process; returns the pid to report.

        A failed start leaves an exec created. An init has ended by it: its guest cannot start one
        again, and clients refuse to delete a task that is created.
        """
        process.advance("start")
        try:
            process.stdio.join(self.guest.dial)
            ref = self._ref(process)
            timeout_s = self._config.boot_timeout_s
            self.guest.call("StartProcess", ref, StartProcessResponse, timeout_s)
        except BaseException:
            process.advance("start_failed")
            if self.guest.ended.is_set():
                self._vm_ended()
            elif not process.exec_id:
                self._finish(process, NOT_STARTED_STATUS)
            raise
        process.advance("started")
        self._journal.info(f"{process.name} started")
        pid = self.guest.pid
        if process.exec_id:
            self._events.publish(
                TaskExecStarted(container_id=self.id, exec_id=process.exec_id, pid=pid)
            )
        else:
            self._events.publish(TaskStart(container_id=self.id, pid=pid))
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        if process.size is not None:
            self._send_size(process, *process.size)
        return pid

    def kill(self, process: Process, signal: int, *, everyone: bool) -> None:
        """Delivers a signal. Raises CallerError: not_found once the process has ended."""
        if signal > _LAST_SIGNAL:
            raise CallerError(f"signal {signal} does not exist; give 1 to {_LAST_SIGNAL}")
        process.wait_settled(self._config.boot_timeout_s)
        state = process.advance("kill")
        if state == CREATING and not process.exec_id:
            if signal not in _HARMLESS_SIGNALS:
                self.guest.kill()
        elif state == RUNNING:
            self._signal(process, signal, everyone=everyone)
        elif signal not in _HARMLESS_SIGNALS:
            self._finish(process, 128 + signal)

    def resize(self, process: Process, columns: int, rows: int) -> None:
        """Sets the terminal's size; one that is not started yet gets it when it is."""
        process.size = (columns, rows)
        if process.advance("resize") == RUNNING:
            self._send_size(process, columns, rows)

    def delete(self, process: Process) -> None:
        """Removes an ended or never started process; with the init, everything else too."""
        if process.advance("delete") == CREATED and not process.exec_id:
            # No end of an init has begun to end the VM.
            self._end_vm()
        if process.exec_id:
            self._delete_exec(process)
            return
        try:
            self._delete_all()
        except BaseException:
            # So that the next Delete tries again.
            process.advance("delete_failed")
            raise
        self._events.publish(
            TaskDelete(
                container_id=self.id,
                pid=self.guest.pid,
                exit_status=process.exit_status,
                exited_at=timestamp(process.exited_at_ns),
            )
        )

    def _delete_exec(self, process: Process) -> None:
        try:
            self.guest.call("DeleteProcess", self._ref(process), Empty, _KILL_ANSWER_S)
        except VmcellError as error:
            # It may be gone with its VM; the host's part is removed in any case.
            self._journal.info(f"guest on deleting {process.name}: {error}")
        self._forget(process)

    def _delete_all(self) -> None:
        if self._saves_writes and not self.guest.ended.is_set():
            # The shutdown began with the init's end; it is given the time to write back.
            self.guest.ended.wait(self._shutdown_s)
        self.guest.close()
        for process in self.processes():
            # An exec whose end was still being waited for has one too.
            self._finish(process, KILLED_STATUS)
            process.stdio.close()
        self._files.remove()

    def _forget(self, process: Process) -> None:
        process.stdio.close()
        with self._lock:
            self._processes.pop(process.exec_id, None)

    # ---- ends ---------------------------------------------------------------------------------

    def _watch(self, process: Process) -> None:
        try:
            ref = self._ref(process)
            status = self.guest.call("WaitProcess", ref, WaitProcessResponse, None).exit_status
        except VmcellError as error:
            self._journal.warning(f"end of {process.name} not heard from the guest: {error}")
            if not isinstance(error, ConnectionLost):
                self.guest.kill()
            status = KILLED_STATUS
        process.stdio.flush()
        # One byte is all an exit status has; a guest that says more is wrong.
        self._finish(process, status if status <= 255 else 255)

    def _finish(self, process: Process, status: int) -> None:
        # Before anybody is told: a client that knows of the exit reads its streams to their end.
        process.stdio.end()
        if not process.finish(status, lambda: self._publish_exit(process)):
            return
        self._journal.info(f"{process.name} ended with {status}")
        if not process.exec_id:
            threading.Thread(target=self._end_vm, name="end-vm", daemon=True).start()

    def _publish_exit(self, process: Process) -> None:
        self._events.publish(
            TaskExit(
                container_id=self.id,
                id=process.id,
                pid=self.guest.pid,
                exit_status=process.exit_status,
                exited_at=timestamp(process.exited_at_ns),
            )
        )

    def _end_vm(self) -> None:
        """The init has ended: what else ran in the container ends with it, then the VM."""
        until = time.monotonic() + _EXECS_END_S
        for process in self.processes():
            if process.state == RUNNING:
                process.wait_ended(max(0.0, until - time.monotonic()))
        if self._saves_writes and not self.guest.ended.is_set():
            self.guest.shut_down(self._shutdown_s)
        else:
            self.guest.kill()

    @property
    def _shutdown_s(self) -> float:
        # A tenth of the time a boot may take: 6 s by default, more where all is slow.
        return self._config.boot_timeout_s / 10

    def _vm_ended(self) -> None:
        for process in self.processes():
            if process.state == CREATED:
                self._finish(process, KILLED_STATUS)

    def _signal(self, process: Process, signal: int, *, everyone: bool) -> None:
        request = SignalProcessRequest(
            container_id=self.id, exec_id=process.exec_id, signal=signal, all=everyone
        )
        if signal == SIGKILL and not process.exec_id:
            # Whatever the guest answers: it may be one that does not want to be killed.
            threading.Thread(target=self._enforce_kill, args=(process,), daemon=True).start()
        try:
            self.guest.call("SignalProcess", request, Empty, _KILL_ANSWER_S)
        except ConnectionLost as error:
            raise CallerError(f"{process.name} has ended with its VM", code="not_found") from error
        except HostError as error:
            if signal != SIGKILL or process.exec_id or error.code != "deadline_exceeded":
                raise
            self._journal.error(f"{error}; killing the microVM")
            self.guest.kill()

    def _enforce_kill(self, process: Process) -> None:
        if not process.wait_ended(_KILL_ANSWER_S + self._shutdown_s):
            self._journal.error(f"{process.name} outlives SIGKILL; killing the microVM")
            self.guest.kill()

    def _send_size(self, process: Process, columns: int, rows: int) -> None:
        request = ResizePtyRequest(
            container_id=self.id, exec_id=process.exec_id, columns=columns, rows=rows
        )
        try:
            self.guest.call("ResizePty", request, Empty, _KILL_ANSWER_S)
        except VmcellError as error:
            # The process may have ended in between; a size is not worth an error.
            self._journal.info(f"terminal of {process.name} not resized: {error}")

    def _next_stream_id(self) -> int:
        return next(self._stream_ids)

    def _ref(self, process: Process) -> ProcessRef:
        return ProcessRef(container_id=self.id, exec_id=process.exec_id)
