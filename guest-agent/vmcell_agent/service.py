"""The methods of agent.proto: one function each, in the order of the service.

A method answers through a callback, at once or later; an error of ours becomes a status, an OSError
that nothing turned into a sentence becomes "internal". Anything else is a bug and ends PID 1, which
panics the guest with the traceback on its console.
"""

from __future__ import annotations

import os
import signal
import time

from vmcell_agent import containerfs, machine, network, ocispec
from vmcell_agent.container import Container
from vmcell_agent.process import Exit
from vmcell_protos import agent as messages
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmcell_agent.container import Surroundings
    from vmcell_agent.snapshot import Snapshot
    from vmcell_agent.windows import Windows
    from vmcell_protos.wire import Message

    Answer = Callable[[Message | VmcellError], None]

SERVICE = "vmcell.agent.v1.Agent"
MAX_CONTAINERS = 16
_MAX_SIGNAL = 64
_COMMAND_BYTES = 512  # MAX_LISTED_PIDS of them fit into one answer
_TERM_SECONDS = 1.0


class AgentService:
    """Owns the containers. `stop` is called when the machine is to be reset."""

    def __init__(
        self, around: Surroundings, sysfs_directory: str, stop: Callable[[], None]
    ) -> None:
        self._around = around
        self._sysfs_directory = sysfs_directory
        self._windows: Windows | None = None
        self._snapshot: Snapshot | None = None
        self._stop = stop
        self._containers: dict[str, Container] = {}
        self._removing: set[str] = set()

    def dispatch(self, service: str, method: str, payload: bytes, answer: Answer) -> None:
        """Serve one call; `answer` is called once, now or later."""
        row = _METHODS.get(method) if service == SERVICE else None
        try:
            if row is None:
                name = f"{service}/{method}"[:200]
                raise CallerError(f"no method {name!r}", code="unimplemented")
            kind, function = row
            function(self, kind.decode(payload), answer)
        except VmcellError as error:
            answer(error)
        except OSError as error:
            answer(HostError(f"{method}: {error}", code="internal"))

    def forget_host(self) -> None:
        """The host is another one now: nobody waits for what the one before has asked."""
        if self._snapshot is not None:
            self._snapshot.forget_host()
        for container in self._containers.values():
            container.forget_host()

    def close(self) -> None:
        """Kill and unmount every container; errors do not stop it. Idempotent."""
        for container in self._containers.values():
            try:
                container.end_now()
            except HostError as error:
                self._around.log(f"container {container.id}: {error}")
        self._containers.clear()

    # -- the guest

    def hello(self, request: messages.HelloRequest, answer: Answer) -> None:
        answer(
            messages.HelloResponse(
                agent_version=machine.AGENT_VERSION,
                kernel_release=os.uname().release,
                kernel_boot_ms=machine.kernel_boot_ms(),
            )
        )

    def configure_guest(self, request: messages.ConfigureGuestRequest, answer: Answer) -> None:
        self._plan_guest(request)()
        answer(messages.Empty())

    def _plan_guest(self, request: messages.ConfigureGuestRequest) -> Callable[[], None]:
        """Judges the request, raising CallerError; what comes back does it, now or later."""
        asked_ns = time.monotonic_ns()
        plans = network.plan(request.interfaces)
        sysctls = ocispec.sysctl_files(request.sysctls)

        def set_guest() -> None:
            if request.unix_time_ns:
                machine.set_clock(request.unix_time_ns + time.monotonic_ns() - asked_ns)
            if request.entropy:
                machine.add_entropy(request.entropy)
            if request.hostname:
                self._around.pod.rename(request.hostname)
            network.configure(plans)
            containerfs.write_sysctls(sysctls)

        return set_guest

    def attach_device(self, request: messages.AttachDeviceRequest, answer: Answer) -> None:
        def attached(result: str | VmcellError) -> None:
            if isinstance(result, str):
                answer(messages.AttachDeviceResponse(name=result))
            else:
                answer(result)

        self._known_windows().attach(request.window, attached)

    def detach_device(self, request: messages.DetachDeviceRequest, answer: Answer) -> None:
        self._known_windows().detach(request.window, _empty_or_error(answer))

    def _known_windows(self) -> Windows:
        if self._windows is None:
            from vmcell_agent.windows import Windows  # boot does not need it

            around = self._around
            self._windows = Windows(
                around.loop, around.errands, self._sysfs_directory, around.device_directory
            )
        return self._windows

    def shutdown(self, request: messages.Empty, answer: Answer) -> None:
        answer(messages.Empty())
        if self._snapshot is not None:
            self._snapshot.let_go()
        running = False
        for container in self._containers.values():
            try:
                if container.cgroup.populated():
                    running = True
                    container.cgroup.signal_all(signal.SIGTERM)
                    container.cgroup.freeze(False)
            except HostError as error:  # it is killed without having been asked
                self._around.log(f"container {container.id}: {error}")
        self._around.loop.call_later(_TERM_SECONDS if running else 0, self._stop)

    # -- a guest that is saved and restored

    def prepare_snapshot(self, request: messages.PrepareSnapshotRequest, answer: Answer) -> None:
        if self._snapshot is None:
            from vmcell_agent.snapshot import Snapshot  # boot does not need it

            self._snapshot = Snapshot(self._around, self._containers, self._plan_guest)
        self._snapshot.prepare(request.drop_caches, _empty_or_error(answer))

    def adopt_container(self, request: messages.AdoptContainerRequest, answer: Answer) -> None:
        container = self._container(request.container_id)
        answer(self._known_snapshot("AdoptContainer").adopt(container, request))

    def resume_guest(self, request: messages.ResumeGuestRequest, answer: Answer) -> None:
        self._known_snapshot("ResumeGuest").resume(request, _empty_or_error(answer))

    def _known_snapshot(self, method: str) -> Snapshot:
        if self._snapshot is None:
            raise CallerError(
                f"{method}: the guest was not saved by PrepareSnapshot", code="failed_precondition"
            )
        return self._snapshot

    def _check_goes_on(self) -> None:
        if self._snapshot is not None:
            self._snapshot.check_goes_on()

    # -- containers

    def create_container(self, request: messages.CreateContainerRequest, answer: Answer) -> None:
        self._check_goes_on()
        if request.container_id in self._containers:
            raise CallerError(
                f"container {request.container_id!r} exists already", code="already_exists"
            )
        if len(self._containers) >= MAX_CONTAINERS:
            raise CallerError(
                f"the guest has {MAX_CONTAINERS} containers already", code="resource_exhausted"
            )
        place = self._free_place(request.container_id)
        self._containers[request.container_id] = Container(self._around, request, place)
        answer(messages.Empty())

    def _free_place(self, container_id: str) -> str:
        """What the directories of a new container are called: one that was adopted keeps those of
        the id it was made with."""
        taken = {container.place for container in self._containers.values()}
        place, number = container_id, 1
        while place in taken:
            number += 1
            place = f"{container_id}~{number}"  # no container's id has such a character
        return place

    def _container(self, container_id: str) -> Container:
        found = self._containers.get(container_id)
        if found is None or container_id in self._removing:
            raise CallerError(f"no container {container_id[:160]!r}", code="not_found")
        return found

    def container_stats(self, request: messages.ContainerRef, answer: Answer) -> None:
        cgroup = self._container(request.container_id).cgroup
        answer(
            messages.ContainerStatsResponse(
                cpu=cgroup.cpu(),
                memory=cgroup.memory(),
                memory_usage_bytes=cgroup.value("memory.current"),
                memory_limit_bytes=cgroup.value("memory.max"),
                memory_peak_bytes=cgroup.value("memory.peak"),
                memory_events=cgroup.memory_events(),
                pids_current=cgroup.value("pids.current"),
                pids_limit=cgroup.value("pids.max"),
            )
        )

    def list_processes(self, request: messages.ContainerRef, answer: Answer) -> None:
        rows = [
            messages.ListProcessesResponseProcess(
                guest_pid=pid, exec_id=exec_id, command=_command(pid)
            )
            for pid, exec_id in self._container(request.container_id).pids()
        ]
        answer(messages.ListProcessesResponse(processes=rows))

    def update_container(self, request: messages.UpdateContainerRequest, answer: Answer) -> None:
        container = self._container(request.container_id)
        container.update(request.resources_json, _empty_or_error(answer))

    def freeze_container(self, request: messages.ContainerRef, answer: Answer) -> None:
        self._check_goes_on()
        self._container(request.container_id).set_frozen(True, _empty_or_error(answer))

    def thaw_container(self, request: messages.ContainerRef, answer: Answer) -> None:
        self._check_goes_on()
        self._container(request.container_id).set_frozen(False, _empty_or_error(answer))

    def wait_oom(self, request: messages.WaitOomRequest, answer: Answer) -> None:
        def killed(result: int | VmcellError) -> None:
            if isinstance(result, int):
                answer(messages.WaitOomResponse(oom_kills=result))
            else:
                answer(result)

        self._container(request.container_id).wait_oom(request.seen, killed)

    def copy_files(self, request: messages.CopyFilesRequest, answer: Answer) -> None:
        container = self._container(request.container_id)
        container.files.copy_again(request.files, _empty_or_error(answer))

    def read_file(self, request: messages.ReadFileRequest, answer: Answer) -> None:
        def read(result: tuple[int, bytes] | VmcellError) -> None:
            if isinstance(result, VmcellError):
                answer(result)
            else:
                answer(messages.ReadFileResponse(mode=result[0], content=result[1]))

        container = self._container(request.container_id)
        container.files.read(request.path, request.limit_bytes, read)

    # -- processes

    def add_process(self, request: messages.AddProcessRequest, answer: Answer) -> None:
        self._check_goes_on()
        self._container(request.container_id).add(request)
        answer(messages.Empty())

    def start_process(self, request: messages.ProcessRef, answer: Answer) -> None:
        self._check_goes_on()

        def started(result: int | VmcellError) -> None:
            if isinstance(result, int):
                answer(messages.StartProcessResponse(guest_pid=result))
            else:
                answer(result)

        self._container(request.container_id).start(request.exec_id, started)

    def wait_process(self, request: messages.ProcessRef, answer: Answer) -> None:
        container = self._container(request.container_id)

        def ended(result: Exit | VmcellError) -> None:
            if isinstance(result, Exit):
                answer(
                    messages.WaitProcessResponse(
                        exit_status=result.status,
                        exited_at_unix_ns=result.unix_ns,
                        oom_kills=container.oom_kills,
                    )
                )
            else:
                answer(result)

        container.process(request.exec_id).wait(ended)

    def signal_process(self, request: messages.SignalProcessRequest, answer: Answer) -> None:
        if not 1 <= request.signal <= _MAX_SIGNAL:
            raise CallerError(f"signal is {request.signal}; it must be 1 to {_MAX_SIGNAL}")
        container = self._container(request.container_id)
        container.signal(request.exec_id, request.signal, everyone=request.all)
        answer(messages.Empty())

    def resize_pty(self, request: messages.ResizePtyRequest, answer: Answer) -> None:
        if request.rows > 0xFFFF or request.columns > 0xFFFF:
            raise CallerError(f"terminal of {request.columns}x{request.rows} is too large")
        process = self._container(request.container_id).process(request.exec_id)
        process.resize(request.rows, request.columns)
        answer(messages.Empty())

    def close_stdin(self, request: messages.ProcessRef, answer: Answer) -> None:
        self._container(request.container_id).process(request.exec_id).close_input()
        answer(messages.Empty())

    def delete_process(self, request: messages.ProcessRef, answer: Answer) -> None:
        container = self._container(request.container_id)
        if request.exec_id:
            container.forget(request.exec_id)
            answer(messages.Empty())
            return

        def removed(error: VmcellError | None) -> None:
            self._removing.discard(container.id)
            if error is None:
                del self._containers[container.id]
            answer(messages.Empty() if error is None else error)

        self._removing.add(container.id)
        try:
            container.remove(removed)
        except VmcellError:
            self._removing.discard(container.id)
            raise


def _empty_or_error(answer: Answer) -> Callable[[VmcellError | None], None]:
    def done(error: VmcellError | None) -> None:
        answer(messages.Empty() if error is None else error)

    return done


def _command(pid: int) -> str:
    """The command line as ps shows it, "" when the process has ended."""
    try:
        fd = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, _COMMAND_BYTES).replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except ProcessLookupError:
        return ""
    finally:
        os.close(fd)


_METHODS: dict[str, tuple[type[Message], Callable[[AgentService, Any, Answer], None]]] = {
    "Hello": (messages.HelloRequest, AgentService.hello),
    "ConfigureGuest": (messages.ConfigureGuestRequest, AgentService.configure_guest),
    "AttachDevice": (messages.AttachDeviceRequest, AgentService.attach_device),
    "DetachDevice": (messages.DetachDeviceRequest, AgentService.detach_device),
    "PrepareSnapshot": (messages.PrepareSnapshotRequest, AgentService.prepare_snapshot),
    "AdoptContainer": (messages.AdoptContainerRequest, AgentService.adopt_container),
    "ResumeGuest": (messages.ResumeGuestRequest, AgentService.resume_guest),
    "CreateContainer": (messages.CreateContainerRequest, AgentService.create_container),
    "AddProcess": (messages.AddProcessRequest, AgentService.add_process),
    "StartProcess": (messages.ProcessRef, AgentService.start_process),
    "WaitProcess": (messages.ProcessRef, AgentService.wait_process),
    "SignalProcess": (messages.SignalProcessRequest, AgentService.signal_process),
    "ResizePty": (messages.ResizePtyRequest, AgentService.resize_pty),
    "CloseStdin": (messages.ProcessRef, AgentService.close_stdin),
    "ListProcesses": (messages.ContainerRef, AgentService.list_processes),
    "ContainerStats": (messages.ContainerRef, AgentService.container_stats),
    "UpdateContainer": (messages.UpdateContainerRequest, AgentService.update_container),
    "FreezeContainer": (messages.ContainerRef, AgentService.freeze_container),
    "ThawContainer": (messages.ContainerRef, AgentService.thaw_container),
    "WaitOom": (messages.WaitOomRequest, AgentService.wait_oom),
    "CopyFiles": (messages.CopyFilesRequest, AgentService.copy_files),
    "ReadFile": (messages.ReadFileRequest, AgentService.read_file),
    "DeleteProcess": (messages.ProcessRef, AgentService.delete_process),
    "Shutdown": (messages.Empty, AgentService.shutdown),
}
