"""One container in a microVM: made, started, watched, paused, ended, removed.

Who ends what: each started process has a thread that waits for the guest's word of its end; when
the VM is gone these waits fail and the process has ended with 137. A process that was never started
is ended by whoever notices that the VM is gone. So a start event always stands before its exit.
"""

from __future__ import annotations

import json
import os
import threading
import time

from vmcell_protos.agent import (
    AddProcessRequest,
    ContainerStatsResponse,
    CreateContainerRequest,
    ProcessRef,
    ResizePtyRequest,
    StartProcessResponse,
    UpdateContainerRequest,
    WaitProcessResponse,
)
from vmcell_protos.errors import CallerError, GuestError, HostError, VmcellError
from vmcell_protos.events import (
    TaskCreate,
    TaskDelete,
    TaskExecAdded,
    TaskExecStarted,
    TaskExit,
    TaskIO,
    TaskPaused,
    TaskResumed,
    TaskStart,
)
from vmcell_protos.wellknown import Empty
from vmcell_shim.adoption import adopt, check_alike, name_cgroup
from vmcell_shim.client import ConnectionLost
from vmcell_shim.events import timestamp
from vmcell_shim.footprint import Footprint
from vmcell_shim.lifecycle import CREATED, CREATING, PAUSED, RUNNING, SAVING
from vmcell_shim.oci_json import parse_object, read_object, take, take_rows
from vmcell_shim.oom_watch import OomWatch
from vmcell_shim.process import KILLED_STATUS, SIGKILL, Process
from vmcell_shim.rootfs import parse_mounts
from vmcell_shim.saved_container import SavedRoot, open_saved
from vmcell_shim.signals import ANSWER_S, send_signal
from vmcell_shim.sizing import memory_of_update
from vmcell_shim.spec import plan_guest
from vmcell_shim.stdio import Stdio, StreamOwner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.agent import FileCopy
    from vmcell_protos.task import CreateTaskRequest, ExecProcessRequest
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.events import EventPublisher
    from vmcell_shim.journal import Journal
    from vmcell_shim.oci_json import Json
    from vmcell_shim.rootfs import RootImages
    from vmcell_shim.sandbox import Sandbox
    from vmcell_shim.sandbox_files import SandboxFiles
    from vmcell_shim.snapshot_store import OpenSnapshot
    from vmcell_shim.spec import GuestPlan

# What a shell answers for a program it cannot run.
NOT_STARTED_STATUS = 127
# Signals whose default is to do nothing (signal(7)), and the null signal.
_HARMLESS_SIGNALS = (0, 17, 18, 23, 28)
_LAST_SIGNAL = 64
_FREEZE_ANSWER_S = 5.0
_UPDATE_ANSWER_S = 10.0
_STATS_ANSWER_S = 10.0
_EXECS_END_S = 2.0
_END_KNOWN_S = 2.0


class Container:
    """Owns the guest, the streams and the sandbox's files until delete() or a failed create()."""

    def __init__(
        self,
        request: CreateTaskRequest,
        *,
        sandbox: Sandbox,
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
        self.sandbox = sandbox
        self.guest = sandbox.guest
        self._request = request
        self._config = config
        self._footprint = Footprint(
            self.id, sandbox=sandbox, config=config, files=files, own_dir=own_dir, journal=journal
        )
        self._events = events
        self._journal = journal
        self._lock = threading.Lock()
        self._saves_writes = False
        self.images: RootImages | None = None
        self.from_snapshot = ""
        self._oom = OomWatch(self.id, self.guest, events, journal)
        self._held_signals: list[int] = []
        self._owner = StreamOwner(
            namespace=namespace, container_id=request.id, warn=journal.warning
        )
        self.init = Process(self.id, "", self._streams(request))
        self._processes: dict[str, Process] = {"": self.init}

    # ---- making -------------------------------------------------------------------------------

    def create(self, deadline: float) -> int:
        """Makes the container, and the VM where there is none yet; returns the pid to report.

        `deadline` in time.monotonic() seconds is the client's; the boot has one of its own, which
        begins when the images are there. After an error nothing of it is left.
        """
        try:
            self._make(read_object(os.path.join(self.bundle, "config.json")), deadline)
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
            self.vm_ended()
        return self.guest.pid

    def _make(self, spec: Json, deadline: float) -> None:
        if self._request.checkpoint:
            name_cgroup(spec, self.id)
        plan = self._plan(spec)
        saved = open_saved(plan.snapshot, self._request.checkpoint, self._config)
        try:
            self._make_from(saved, plan, spec, deadline)
        finally:
            if saved is not None:
                saved.close()

    def _make_from(
        self, saved: OpenSnapshot | None, plan: GuestPlan, spec: Json, deadline: float
    ) -> None:
        if saved is not None:
            check_alike(saved, self._request, plan, in_pod=self.sandbox.is_pod)
        source = parse_mounts(self._request.rootfs, plan.root_path, plan.read_only_root)
        self._footprint.open(self.bundle)
        saved_root = SavedRoot(saved, self._config) if saved is not None else None
        images = self.images = self._footprint.images(source, saved_root)
        self._journal.info(f"root images {images.lowers}, disk {images.disk or 'none'}")
        self._saves_writes = images.keeps_writes
        deadline = min(deadline, time.monotonic() + self._config.boot_timeout_s)
        if deadline <= time.monotonic():
            raise HostError(
                "the client gave up while the root image was made; it is kept, so try again",
                code="deadline_exceeded",
            )
        self.sandbox.boot(plan, spec, self.bundle, images, deadline, saved)
        devices = self._footprint.attach(images, plan)
        streams = self.init.stdio.declare(self.guest.next_stream_id)
        if saved is not None:
            self.from_snapshot = saved.id
            adopt(self.guest, saved, self.id, streams, plan, spec, deadline)
            return
        request = CreateContainerRequest(
            container_id=self.id,
            rootfs=devices.rootfs,
            spec_json=json.dumps(plan.guest_spec, separators=(",", ":")).encode(),
            streams=streams,
            files=[*plan.files, *self._files_of_pod(spec)],
            init=plan.init,
            shared_namespaces=list(plan.shared_namespaces),
        )
        self.guest.call("CreateContainer", request, Empty, deadline - time.monotonic())

    def _files_of_pod(self, spec: Json) -> list[FileCopy]:
        mounted = {take(row, "destination", str, "") for row in take_rows(spec, "mounts")}
        return [file for file in self.sandbox.member_files if file.destination not in mounted]

    def _plan(self, spec: Json) -> GuestPlan:
        return plan_guest(
            spec,
            default_vcpus=self._config.default_vcpus,
            default_memory_mib=self._config.default_memory_mib,
            in_pod=self.sandbox.is_pod,
        )

    def _give_up(self) -> None:
        """Undoes a creation; what cannot be undone is logged, the first error is the user's."""
        self.init.finish(KILLED_STATUS, lambda: None)
        self.init.stdio.close()
        for step in (self._footprint.leave_guest, self._footprint.release):
            try:
                step()
            except VmcellError as error:
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
        process = Process(self.id, request.exec_id, self._streams(request))
        with self._lock:
            taken = request.exec_id in self._processes
            if not taken:
                self._processes[request.exec_id] = process
        if taken:
            process.stdio.close()
            raise CallerError(f"exec {request.exec_id} exists already", code="already_exists")
        try:
            process.unsent = AddProcessRequest(
                container_id=self.id,
                exec_id=request.exec_id,
                process_json=request.spec.value if request.spec else b"",
                streams=process.stdio.declare(self.guest.next_stream_id),
            )
            # A guest makes a container's namespaces when its init starts; until then the exec is
            # known here alone.
            if self.init.state == RUNNING:
                self._introduce(process)
            process.advance("created")
        except BaseException:
            self._forget(process)
            raise
        self._events.publish(TaskExecAdded(container_id=self.id, exec_id=request.exec_id))

    def _streams(self, request: CreateTaskRequest | ExecProcessRequest) -> Stdio:
        return Stdio(
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            terminal=request.terminal,
            owner=self._owner,
        )

    def _introduce(self, process: Process) -> None:
        """The guest learns of an exec, once. Raises VmcellError."""
        if process.unsent is not None:
            self.guest.call("AddProcess", process.unsent, Empty, self._config.boot_timeout_s)
            process.unsent = None

    def start(self, process: Process) -> int:
        """Runs a created process; returns the pid to report.

        A failed start leaves an exec created. An init has ended by it: its guest cannot start one
        again, and clients refuse to delete a task that is created.
        """
        if process.exec_id:
            self.init.wait_settled(self._config.boot_timeout_s)
            self.init.advance("start_an_exec_in")
        process.advance("start")
        try:
            self._introduce(process)
            process.stdio.join(self.guest.dial)
            if self.from_snapshot and not process.exec_id:
                self.guest.wake()
            else:
                ref = self._ref(process)
                timeout_s = self._config.boot_timeout_s
                self.guest.call("StartProcess", ref, StartProcessResponse, timeout_s)
        except BaseException as error:
            process.advance("start_failed")
            # One that cannot be reached may have ended, which is known a moment later.
            unreachable = isinstance(error, HostError | GuestError)
            if self.guest.ended.wait(_END_KNOWN_S if unreachable else 0):
                self.vm_ended()
            elif not process.exec_id:
                self._finish(process, NOT_STARTED_STATUS)
            raise
        process.advance("started")
        self._journal.info(f"{process.name} started")
        if not process.exec_id:
            self._footprint.keep_fresh()
        pid = self.guest.pid
        if process.exec_id:
            self._events.publish(
                TaskExecStarted(container_id=self.id, exec_id=process.exec_id, pid=pid)
            )
        else:
            self._events.publish(TaskStart(container_id=self.id, pid=pid))
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        if not process.exec_id:
            self._oom.start()
        if process.size is not None:
            self._send_size(process, *process.size)
        return pid

    def kill(self, process: Process, signal: int, *, everyone: bool) -> None:
        """Delivers a signal. Raises CallerError: not_found once the process has ended."""
        if signal > _LAST_SIGNAL:
            raise CallerError(f"signal {signal} does not exist; give 1 to {_LAST_SIGNAL}")
        process.wait_settled(self._config.boot_timeout_s)
        state = process.advance("kill")
        standing = self.init.state in (PAUSED, SAVING) and not self.sandbox.is_pod
        if state in (CREATED, RUNNING) and standing:
            # An exec of a paused VM: nothing can be asked of the guest.
            text = f"cannot kill {process.name}: task {self.id} is paused; resume it first"
            raise CallerError(text, code="failed_precondition")
        if state in (PAUSED, SAVING) and not self.sandbox.is_pod:
            self._kill_paused(signal)
        elif state == CREATING and not process.exec_id:
            if signal not in _HARMLESS_SIGNALS:
                self.guest.kill()
        elif state in (RUNNING, PAUSED):
            self._signal(process, signal, everyone=everyone)
        elif signal not in _HARMLESS_SIGNALS:
            self._finish(process, 128 + signal)

    def _kill_paused(self, signal: int) -> None:
        """A VM that stands still takes a signal when it goes on; SIGKILL makes it go on, or ends
        one that cannot, or that has written back all there is, to be saved."""
        if signal == SIGKILL and (self.init.state == SAVING or self.guest.stands_still):
            self.guest.kill()
            return
        self._held_signals.append(signal)
        try:
            if signal == SIGKILL:
                self.resume()
        except VmcellError as error:
            if self.init.state != PAUSED:
                raise
            self._journal.error(f"{self.id} does not go on to be killed: {error}")
            self.guest.kill()

    def pause(self) -> None:
        """All processes of the container stand still: alone in its VM by the vCPUs, in a pod by the
        guest's freezer. Raises VmcellError."""
        self._switch("pause", self.guest.pause, "FreezeContainer", then="paused")
        self._events.publish(TaskPaused(container_id=self.id))

    def resume(self) -> None:
        """They go on. Raises VmcellError."""
        self._switch("resume", self.guest.resume, "ThawContainer", then="resumed")
        self._events.publish(TaskResumed(container_id=self.id))
        self._send_held()

    def _switch(self, wish: str, vcpus: Callable[[], None], in_pod: str, *, then: str) -> None:
        self.init.advance(wish)
        try:
            if self.sandbox.is_pod:
                self.guest.call(in_pod, self._footprint.ref(), Empty, _FREEZE_ANSWER_S)
            else:
                vcpus()
        except BaseException:
            self.init.advance_unless_ended(f"{wish}_failed")
            raise
        self.init.advance(then)

    def _send_held(self) -> None:
        held, self._held_signals = self._held_signals, []
        for signal in held:
            try:
                self._signal(self.init, signal, everyone=False)
            except VmcellError as error:
                # One before it may have ended the process.
                self._journal.warning(f"signal {signal} held for {self.id} is lost: {error}")

    def end_save(self, *, goes_on: bool, was_paused: bool) -> None:
        """State `saving` is over: it goes on, or stands still as if paused."""
        if not self.init.advance_unless_ended("saved" if goes_on else "saved_and_paused"):
            return
        if goes_on and was_paused:
            self._events.publish(TaskResumed(container_id=self.id))
        elif not goes_on and not was_paused:
            self._events.publish(TaskPaused(container_id=self.id))
        if goes_on:
            self._send_held()

    def update(self, resources: bytes) -> None:
        """New limits (OCI linux.resources as JSON), inside what the VM was booted with."""
        self.init.advance("update")
        limits = parse_object(resources, "the resources")
        needed_mib = memory_of_update(
            limits, vcpus=self.sandbox.vcpus, memory_mib=self.sandbox.memory_mib
        )
        request = UpdateContainerRequest(container_id=self.id, resources_json=resources)
        self.guest.call("UpdateContainer", request, Empty, _UPDATE_ANSWER_S)
        self.sandbox.limit(limits)
        if needed_mib is not None and not self.sandbox.is_pod:
            self.guest.give_back(self.sandbox.memory_mib - needed_mib)

    def stats(self) -> ContainerStatsResponse:
        """The guest's numbers of a running container. Raises VmcellError: not_found once its VM
        ends, as its exit is about to say."""
        self.init.advance("stats")
        ref = self._footprint.ref()
        try:
            return self.guest.call("ContainerStats", ref, ContainerStatsResponse, _STATS_ANSWER_S)
        except ConnectionLost as error:
            raise CallerError(
                f"task {self.id} has no numbers: its microVM has ended", code="not_found"
            ) from error

    def resize(self, process: Process, columns: int, rows: int) -> None:
        """Sets the terminal's size; one that is not started yet gets it when it is."""
        process.size = (columns, rows)
        if process.advance("resize") == RUNNING:
            self._send_size(process, columns, rows)

    def delete(self, process: Process) -> None:
        """Removes an ended or never started process; with the init, everything else too."""
        before = process.advance("delete")
        if before == CREATED and not process.exec_id and not self.sandbox.is_pod:
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
            if process.unsent is None:
                self.guest.call("DeleteProcess", self._ref(process), Empty, ANSWER_S)
        except VmcellError as error:
            # It may be gone with its VM; the host's part is removed in any case.
            self._journal.info(f"guest on deleting {process.name}: {error}")
        self._forget(process)

    def _delete_all(self) -> None:
        if self.sandbox.is_pod:
            self._footprint.leave_guest()
        elif self._saves_writes and not self.guest.ended.is_set():
            # The shutdown began with the init's end; it is given the time to write back.
            self.guest.ended.wait(self._shutdown_s)
        self._footprint.release()
        for process in self.processes():
            # An exec whose end was still being waited for has one too.
            self._finish(process, KILLED_STATUS)
            process.stdio.close()

    def _forget(self, process: Process) -> None:
        process.stdio.close()
        with self._lock:
            self._processes.pop(process.exec_id, None)

    # ---- ends ---------------------------------------------------------------------------------

    def _watch(self, process: Process) -> None:
        try:
            ref = self._ref(process)
            answer = self.guest.call("WaitProcess", ref, WaitProcessResponse, None)
            status = answer.exit_status
            self._oom.tell(answer.oom_kills)
        except VmcellError as error:
            self._journal.warning(f"end of {process.name} not heard from the guest: {error}")
            if not isinstance(error, ConnectionLost) and not self.sandbox.is_pod:
                self.guest.kill()
            status = KILLED_STATUS
        if not process.exec_id:
            self._footprint.write_back()
        process.stdio.flush()
        # One byte is all an exit status has; a guest that says more is wrong.
        self._finish(process, status if status <= 255 else 255)

    def _finish(self, process: Process, status: int) -> None:
        # Before anybody is told: a client that knows of the exit reads its streams to their end.
        process.stdio.end()
        if not process.finish(status, lambda: self._publish_exit(process)):
            return
        self._journal.info(f"{process.name} ended with {status}")
        if not process.exec_id and not self.sandbox.is_pod:
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

    def vm_ended(self) -> None:
        """The VM is gone: what was never started has ended too; the rest has its own watch."""
        for process in self.processes():
            if process.state == CREATED:
                self._finish(process, KILLED_STATUS)

    def _signal(self, process: Process, signal: int, *, everyone: bool) -> None:
        send_signal(
            self.guest,
            process,
            signal,
            everyone=everyone,
            end_s=self._shutdown_s,
            journal=self._journal,
        )

    def _send_size(self, process: Process, columns: int, rows: int) -> None:
        request = ResizePtyRequest(
            container_id=self.id, exec_id=process.exec_id, columns=columns, rows=rows
        )
        try:
            self.guest.call("ResizePty", request, Empty, ANSWER_S)
        except VmcellError as error:
            # The process may have ended in between; a size is not worth an error.
            self._journal.info(f"terminal of {process.name} not resized: {error}")

    def _ref(self, process: Process) -> ProcessRef:
        return ProcessRef(container_id=self.id, exec_id=process.exec_id)
