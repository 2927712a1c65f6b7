"""One container: its root, its cgroup, its processes, and their removal in the right order."""

from __future__ import annotations

import re
import signal
import time

from vmcell_agent import abi, liveshare, ociprocess, ocispec, pod
from vmcell_agent.cgroup import Cgroup
from vmcell_agent.child import InitLaunch
from vmcell_agent.containerfiles import ContainerFiles
from vmcell_agent.jsonfields import parse_object
from vmcell_agent.mountoptions import POD_SHARED_MEMORY
from vmcell_agent.process import DECLARED, ENDED, FAILED, RUNNING, Process
from vmcell_agent.rootfs import RootFilesystem
from vmcell_protos.agent import Streams
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vmcell_agent.errand import Errands
    from vmcell_agent.eventloop import Loop
    from vmcell_agent.freezer import Freezer
    from vmcell_agent.limits import Limits
    from vmcell_agent.ociprocess import ProcessSpec
    from vmcell_agent.ocispec import ContainerSpec
    from vmcell_agent.oom import OomWatch
    from vmcell_agent.pod import Pod
    from vmcell_agent.reaper import Reaper
    from vmcell_agent.spawn import Child, Spawner
    from vmcell_agent.streamdoor import StreamDoor
    from vmcell_protos.agent import AddProcessRequest, CreateContainerRequest, Rootfs

    # The builder's takes the path of the overlay's upper directory, others take nothing.
    Builtin = Callable[..., Callable[[Callable[[], None]], NoReturn]]
    Done = Callable[[VmcellError | None], None]

MAX_PROCESSES = 64
BUILDER = "envd-builder"  # the init that gives away what was written into the root
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_REMOVE_SECONDS, _REMOVE_STEP_SECONDS = 5.0, 0.02
_END_SECONDS, _END_STEP_SECONDS = 1.0, 0.01


def check_id(value: str, what: str) -> None:
    """Raise CallerError unless `value` can be a file's name and nothing else."""
    if not _ID.fullmatch(value):
        raise CallerError(f"{what} {value[:160]!r} must be letters, digits, '.', '_' or '-'")


class Surroundings:
    """What every container of an agent shares."""

    __slots__ = ("builtins", "cgroup_root", "device_directory", "door", "errands", "log", "loop",
                 "pod", "reaper", "spawner", "state_directory")  # fmt: skip

    def __init__(
        self,
        *,
        loop: Loop,
        door: StreamDoor,
        reaper: Reaper,
        spawner: Spawner,
        errands: Errands,
        pod: Pod,
        cgroup_root: str,
        state_directory: str,
        device_directory: str,
        builtins: dict[str, Builtin],
        log: Callable[[str], None],
    ) -> None:
        """`builtins`: programs of the agent's own that can be a container's init, by name."""
        self.loop = loop
        self.door = door
        self.reaper = reaper
        self.spawner = spawner
        self.errands = errands
        self.pod = pod
        self.cgroup_root = cgroup_root
        self.state_directory = state_directory
        self.device_directory = device_directory
        self.builtins = builtins
        self.log = log


class Container:
    """Made whole or not at all; `remove` gives everything back."""

    def __init__(
        self, around: Surroundings, request: CreateContainerRequest, place: str = ""
    ) -> None:
        """`place` is what its directories are called, the id if empty: it stays, the id may change.
        Raises CallerError or HostError; then nothing is left behind."""
        check_id(request.container_id, "container id")
        builtin = _builtin(around, request.init)
        spec = ocispec.parse_spec(request.spec_json, needs_args=builtin is None)
        if request.rootfs is None:
            raise CallerError("rootfs is missing; name the container's devices")
        self.id = request.container_id
        self.name = f"container {self.id!r}"
        self.place = place or self.id
        self.spec: ContainerSpec = spec
        self.files = ContainerFiles(around.errands, self.name, request.files)
        self._shared = pod.shared_flags(request.shared_namespaces)
        self._around = around
        self._builtin = builtin
        self._is_builder = request.init == BUILDER
        self._shared_memory = self._live_share = ""
        self._cgroup = Cgroup(f"{around.cgroup_root}/{self.place}")
        self._oom: OomWatch | None = None
        self._freezer: Freezer | None = None
        self._limits: Limits | None = None
        self._root = RootFilesystem(f"{around.state_directory}/{self.place}")
        self._processes: dict[str, Process] = {}
        self._nameless: list[Process] = []  # added ones that live on after an adoption
        process = spec.process
        if builtin is not None:
            # envd switches users itself, so it starts as root; the OOM killer spares it as it does
            # PID 1, because its end is the container's, and does not spare what it starts.
            process = process.replace(uid=0, gid=0, additional_gids=(), oom_score_adj=None)
        self._declare("", process, request.streams, says_ready=builtin is not None)
        try:
            self._make(request.rootfs)
        except VmcellError:
            self._processes.pop("").close()
            raise

    def _make(self, rootfs: Rootfs) -> None:
        self._cgroup.create(self.spec.cgroup_files)
        try:
            self._root.mount(
                rootfs,
                self._around.device_directory,
                read_only=self.spec.root_read_only,
                user_xattrs=self._is_builder,
            )
            if self._is_builder and not self._root.upper:
                raise CallerError(
                    f"init {BUILDER} needs a root of layers with a disk for writes above them"
                )
            self._join_pod()
        except VmcellError:
            self._root.close()
            self._cgroup.remove()
            raise

    def _join_pod(self) -> None:
        pod = self._around.pod
        for mount in self.spec.mounts:
            if mount.fstype == POD_SHARED_MEMORY:
                self._shared_memory = pod.shared_memory(mount.data)
            elif mount.fstype == liveshare.FSTYPE:
                self._live_share = pod.live_share()
        if self._shared & abi.CLONE_NEWUTS:
            pod.name_once(self.spec.hostname, self.spec.domainname)
        if self._shared & abi.CLONE_NEWPID:
            pod.join_pid_namespace(self.place)

    def _declare(
        self,
        exec_id: str,
        spec: ProcessSpec,
        streams: Streams | None,
        *,
        says_ready: bool = False,
    ) -> None:
        self._processes[exec_id] = Process(
            self._around.loop,
            self._around.door,
            self._name_of(exec_id),
            spec,
            streams or Streams(),
            says_ready=says_ready,
            told=None if exec_id else self.files.told,
        )

    def _name_of(self, exec_id: str) -> str:
        return f"process {exec_id!r} of {self.name}" if exec_id else f"init of {self.name}"

    @property
    def init(self) -> Process:
        return self._processes[""]

    def process(self, exec_id: str) -> Process:
        """The process of that id ("": init); raises CallerError(not_found)."""
        found = self._processes.get(exec_id)
        if found is None:
            raise CallerError(f"{self.name} has no process {exec_id[:160]!r}", code="not_found")
        return found

    def add(self, request: AddProcessRequest) -> None:
        """Declare one more process; raises CallerError."""
        check_id(request.exec_id, "exec id")
        if request.exec_id in self._processes:
            raise CallerError(
                f"{self.name} has a process {request.exec_id!r} already",
                code="already_exists",
            )
        if len(self._processes) > MAX_PROCESSES:
            raise CallerError(
                f"{self.name} has {MAX_PROCESSES} added processes; delete one first",
                code="resource_exhausted",
            )
        self._check_running()
        spec = ociprocess.parse_process(parse_object(request.process_json, "process"))
        self._declare(request.exec_id, spec, request.streams)

    def _check_running(self) -> None:
        """Raise CallerError unless a process can be added."""
        if self._freezer is not None and self._freezer.frozen:
            raise CallerError(f"{self.name} is frozen; thaw it first", code="failed_precondition")
        self._check_init()

    def _check_init(self) -> None:
        if self.init.state != RUNNING:
            raise CallerError(
                f"{self.name} is not running; its init is {self.init.state}",
                code="failed_precondition",
            )

    def start(self, exec_id: str, answer: Callable[[int | VmcellError], None]) -> None:
        """Start init or an added process; answers with its pid in the guest."""
        process = self.process(exec_id)
        if exec_id:
            self._check_running()
        process.start(lambda: self._spawn(process), answer)

    def _spawn(self, process: Process) -> Child:
        if process is self.init:
            place: InitLaunch | int = self._init_launch()
        else:
            self._check_running()
            place = self.init.pid
        child = self._around.spawner.spawn(
            process.spec, process.streams, process.window, self._cgroup, place
        )
        if process is self.init:
            self._around.reaper.expect(child.pid, self._init_reaped)
        else:
            self._around.reaper.expect(child.pid, process.reaped)
        return child

    def _init_launch(self) -> InitLaunch:
        shares_pids = self._shared & abi.CLONE_NEWPID
        return InitLaunch(
            spec=self.spec,
            root=self._root.path,
            root_read_only=self.spec.root_read_only or not self._root.writable,
            files=self.files.take(),
            shared_namespaces=self._shared,
            pid_namespace=self._around.pod.pid_namespace() if shares_pids else -1,
            shared_memory=self._shared_memory,
            live_share=self._live_share,
            boot_id=self._around.pod.boot_id(),
            load_builtin=self._load_builtin,
        )

    @property
    def _load_builtin(self) -> Builtin | None:
        builtin, upper = self._builtin, self._root.upper
        if builtin is None or not self._is_builder:
            return builtin
        return lambda: builtin(upper)

    def _init_reaped(self, wait_status: int) -> None:
        if self._shared & abi.CLONE_NEWPID:  # it was not pid 1, so the kernel kills nobody with it
            try:
                self._cgroup.signal_all(signal.SIGKILL)
            except HostError as error:
                self._around.log(f"{self.name}: {error}")
        self.init.reaped(wait_status)

    def signal(self, exec_id: str, number: int, *, everyone: bool) -> None:
        """Signal one process, or with `everyone` every process of the container."""
        process = self.process(exec_id)
        if everyone and self.init.state == RUNNING:
            self._cgroup.signal_all(number)
        else:
            process.signal(number)

    def pids(self) -> list[tuple[int, str]]:
        """Pids in the guest with the exec id of those that were started by request."""
        known = {
            process.pid: exec_id
            for exec_id, process in self._processes.items()
            if process.state == RUNNING
        }
        return [(pid, known.get(pid, "")) for pid in self._cgroup.pids()]

    @property
    def cgroup(self) -> Cgroup:
        return self._cgroup

    @property
    def oom_kills(self) -> int:
        """Processes of the container that an OOM killer has ended so far."""
        try:
            return self._cgroup.oom_kills
        except HostError:  # the cgroup has just been removed, and what it counted with it
            return 0

    # What follows is imported when it is first asked for: PID 1's imports are boot time.

    def wait_oom(self, seen: int, answer: Callable[[int | VmcellError], None]) -> None:
        """Answers with the count once it is above `seen`; not_found when the container goes."""
        if self._oom is None:
            from vmcell_agent.oom import OomWatch

            self._oom = OomWatch(self._around.loop, self._cgroup, self.name)
        self._oom.wait(seen, answer)

    def set_frozen(self, frozen: bool, answer: Done) -> None:
        """Freeze or thaw; answers when every process stands still, or goes on again."""
        self._check_init()
        self.freezer.set(frozen, answer)

    @property
    def freezer(self) -> Freezer:
        if self._freezer is None:
            from vmcell_agent.freezer import Freezer

            self._freezer = Freezer(self._around.loop, self._cgroup, self.name)
        return self._freezer

    def update(self, resources_json: bytes, answer: Done) -> None:
        """Change the limits that `linux.resources` names."""
        if self.init.state in (ENDED, FAILED):
            raise CallerError(f"{self.name} has ended", code="failed_precondition")
        if self._limits is None:
            from vmcell_agent.limits import Limits

            self._limits = Limits(self._around.errands, self._cgroup, self.name)
        self._limits.update(resources_json, answer)

    # What a snapshot and a restored guest need.

    @property
    def processes(self) -> list[Process]:
        """Those that were asked for, and what an adoption has left without a name."""
        return [*self._processes.values(), *self._nameless]

    @property
    def file_systems(self) -> list[str]:
        """Where what the container has written can be written back."""
        return [path for path in (self._root.path, self._root.upper) if path]

    @property
    def has_own_hostname(self) -> bool:
        return not self._shared & abi.CLONE_NEWUTS

    def adopt(self, new_id: str, streams: Streams, dialled: Callable[[], None]) -> None:
        """Another name, other streams for the init; processes that were added live on without a
        name. Raises CallerError, and nothing has changed then."""
        check_id(new_id, "new container id")
        self.init.adopt_streams(streams, dialled)
        for exec_id in [name for name in self._processes if name]:
            self._leave(self._processes.pop(exec_id))
        self.id = new_id
        self.name = f"container {new_id!r}"
        self.init.name = self._name_of("")
        for named in (self.files, self._oom, self._freezer, self._limits):
            if named is not None:
                named.name = self.name

    def _leave(self, process: Process) -> None:
        if process.state in (DECLARED, ENDED, FAILED):
            self._close_process(process)
            return
        self._nameless.append(process)
        process.leave(lambda: self._end_nameless(process))

    def _end_nameless(self, process: Process) -> None:
        if process in self._nameless:  # the removal has closed it before
            self._nameless.remove(process)
            self._close_process(process)

    def forget_host(self) -> None:
        """The host is another one now, and nobody waits for an answer."""
        for process in self._processes.values():
            process.forget_host()
        if self._oom is not None:
            self._oom.forget_waiters()

    def forget(self, exec_id: str) -> None:
        """Forget an added process that is not running; raises CallerError."""
        process = self.process(exec_id)
        if process.state not in (DECLARED, ENDED, FAILED):
            raise CallerError(
                f"{process.name} is {process.state}; kill it first", code="failed_precondition"
            )
        del self._processes[exec_id]
        self._close_process(process)

    def remove(self, done: Callable[[VmcellError | None], None]) -> None:
        """Kill what is left, give back cgroup and mounts; raises CallerError while init lives."""
        if self.init.state not in (DECLARED, ENDED, FAILED):
            raise CallerError(
                f"{self.init.name} is {self.init.state}; kill it first", code="failed_precondition"
            )
        self._cgroup.signal_all(signal.SIGKILL)
        self._remove_step(done, _REMOVE_SECONDS)

    def _remove_step(self, done: Callable[[VmcellError | None], None], seconds: float) -> None:
        try:
            self._end_waiting()
            if not self._cgroup.populated() and self._cgroup.remove():
                self.close()
                done(None)
                return
        except HostError as error:
            done(error)
            return
        if seconds <= 0:
            done(HostError(f"{self.name} still has processes", code="unavailable"))
            return
        self._around.loop.call_later(
            _REMOVE_STEP_SECONDS,
            lambda: self._remove_step(done, seconds - _REMOVE_STEP_SECONDS),
        )

    def _end_waiting(self) -> None:
        for waited_for in (self._oom, self._freezer):
            if waited_for is not None:
                waited_for.close()

    def end_now(self) -> None:
        """Kill everything and unmount, blocking for a moment: the machine is about to be reset."""
        self._cgroup.signal_all(signal.SIGKILL)
        end = time.monotonic() + _END_SECONDS
        while self._cgroup.populated() and time.monotonic() < end:
            time.sleep(_END_STEP_SECONDS)
        self._cgroup.remove()
        self.close()

    def close(self) -> None:
        """Forget processes and unmount, whatever runs; raises HostError. Idempotent."""
        self._end_waiting()
        nameless, self._nameless = self._nameless, []
        for process in (*self._processes.values(), *nameless):
            self._close_process(process)
        self.files.close()
        self._around.pod.leave_pid_namespace(self.place)
        self._root.close()

    def _close_process(self, process: Process) -> None:
        process.close()
        if process.dropped_bytes:
            self._around.log(f"{process.name}: {process.dropped_bytes} bytes had no reader")


def _builtin(around: Surroundings, name: str) -> Builtin | None:
    if not name:
        return None
    if name not in around.builtins:
        known = ", ".join(around.builtins) or "none"
        raise CallerError(f"init is {name[:64]!r}; this agent has {known}")
    return around.builtins[name]
