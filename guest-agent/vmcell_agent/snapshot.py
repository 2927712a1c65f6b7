"""The guest stands still to be saved, and goes on: in the same machine, or restored in another.

    RUNNING   --PrepareSnapshot--> PREPARING --frozen, written back, streams parked--> HELD
    PREPARING --an error---------> RUNNING
    HELD      --ResumeGuest------> DIALLING  --every adopted stream is dialled-------> RENEWING
    RENEWING  --the guest is set, its identity renewed--> THAWING --all go on--------> RUNNING
    DIALLING, RENEWING --an error, a deadline, another host--> HELD

What ran is frozen first and its streams are parked last, so that they can hand over as much as
possible. What the user had frozen is left alone by the thaw. Between PREPARING and RUNNING nothing
new is started (see `check_goes_on`).
"""

from __future__ import annotations

import gc
import os

from vmcell_agent import identity, process, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.agent import AdoptContainerResponse, ConfigureGuestRequest, Streams
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.container import Container, Surroundings
    from vmcell_agent.eventloop import Timer
    from vmcell_agent.process import Process
    from vmcell_protos.agent import AdoptContainerRequest, ResumeGuestRequest

    Done = Callable[[VmcellError | None], None]
    PlanGuest = Callable[[ConfigureGuestRequest], Callable[[], None]]

RUNNING, PREPARING, HELD = "running", "being saved", "saved"
DIALLING, RENEWING, THAWING = "waiting for its streams", "getting its identity", "going on again"
START_SECONDS = 10.0
WRITE_BACK_SECONDS = 60.0
IDENTITY_SECONDS = 10.0
VM_DIRECTORY = "/proc/sys/vm"


class _All:
    """Calls `done` with the first error, or None, when `count` answers have come."""

    def __init__(self, count: int, done: Done) -> None:
        self._left = count
        self._error: VmcellError | None = None
        self._done = done
        if not count:
            done(None)

    def part(self, result: VmcellError | None = None) -> None:
        self._left -= 1
        self._error = self._error or result
        if not self._left:
            self._done(self._error)


class Snapshot:
    """One for the agent; `containers` is the service's own table."""

    def __init__(
        self, around: Surroundings, containers: dict[str, Container], plan_guest: PlanGuest
    ) -> None:
        """`plan_guest` judges a ConfigureGuestRequest and returns what does it."""
        self.state = RUNNING
        self._around = around
        self._containers = containers
        self._plan_guest = plan_guest
        self._step = object()  # another one for each call: what an earlier one has left is stale
        self._answer: Done = _to_nobody
        self._timer: Timer | None = None
        self._drop_caches = False
        self._was_held = False
        self._set_guest: Callable[[], None] = _nothing
        self._machine_id, self._hostname = b"", ""
        self._to_thaw: list[Container] = []

    def check_goes_on(self) -> None:
        """Raise CallerError while nothing may be started or thawed."""
        if self.state != RUNNING:
            raise CallerError(
                f"the guest is being saved ({self.state}); ResumeGuest comes first",
                code="failed_precondition",
            )

    def _check_held(self, method: str) -> None:
        if self.state != HELD:
            raise CallerError(
                f"{method}: the guest is {self.state}; it must have been saved by PrepareSnapshot",
                code="failed_precondition",
            )

    def _processes(self) -> list[Process]:
        return [row for container in self._containers.values() for row in container.processes]

    def _begin(self, state: str, answer: Done) -> object:
        self.state, self._answer = state, answer
        self._step = object()
        return self._step

    def _end(self, state: str, result: VmcellError | None) -> None:
        self._stop_timer()
        answer, self._answer = self._answer, _to_nobody
        self.state = state
        self._step = object()
        answer(result)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- standing still

    def prepare(self, drop_caches: bool, answer: Done) -> None:
        """Answers when all stands still and is written back; raises CallerError."""
        if self.state == HELD and not drop_caches:
            answer(None)
            return
        if self.state not in (RUNNING, HELD):
            raise CallerError(f"the guest is {self.state} already", code="failed_precondition")
        self._was_held, self._drop_caches = self.state == HELD, drop_caches
        step = self._begin(PREPARING, answer)
        settle()
        if self._was_held:
            self._write_back()
            return
        late = HostError(
            f"a process was still being started after {START_SECONDS:g} s", code="deadline_exceeded"
        )
        self._timer = self._around.loop.call_later(START_SECONDS, lambda: self._go_back(late))
        processes = self._processes()

        def started(_: VmcellError | None) -> None:
            if self._step is step:
                self._freeze()

        all_started = _All(len(processes), started)
        for row in processes:
            row.when_not_starting(all_started.part)

    def _freeze(self) -> None:
        self._stop_timer()
        running = [row for row in self._containers.values() if row.init.state == process.RUNNING]
        self._to_thaw = [row for row in running if not row.freezer.frozen]
        self._set_frozen(running, True, self._on_frozen)

    def _set_frozen(self, containers: list[Container], frozen: bool, done: Done) -> None:
        all_done = _All(len(containers), done)
        for container in containers:
            try:
                container.freezer.set(frozen, all_done.part)
            except VmcellError as error:
                all_done.part(error)

    def _on_frozen(self, error: VmcellError | None) -> None:
        if error is None:
            self._write_back()
        else:
            self._go_back(error)

    def _write_back(self) -> None:
        places = [
            (container.name, path)
            for container in self._containers.values()
            for path in container.file_systems
        ]
        drop_caches = self._drop_caches
        try:
            self._around.errands.run(
                "write back the containers' files",
                lambda: write_back(places, drop_caches),
                self._on_written,
                seconds=WRITE_BACK_SECONDS,
            )
        except VmcellError as error:
            self._go_back(error)

    def _on_written(self, result: bytes | VmcellError) -> None:
        if isinstance(result, VmcellError):
            self._go_back(result)
            return
        for row in self._processes():
            row.park_streams()
        self._end(HELD, None)

    def _go_back(self, error: VmcellError) -> None:
        """It could not be saved: as it was before."""
        if self._was_held:
            self._end(HELD, error)
            return
        frozen = [row for row in self._to_thaw if row.freezer.frozen]
        self._to_thaw = []
        self._set_frozen(frozen, False, self._log)
        self._end(RUNNING, error)

    def _log(self, error: VmcellError | None) -> None:
        if error is not None:
            self._around.log(str(error))

    # -- another owner

    def adopt(self, container: Container, request: AdoptContainerRequest) -> AdoptContainerResponse:
        """Give the container its new name and streams; raises CallerError."""
        self._check_held("AdoptContainer")
        old_id, new_id = container.id, request.new_container_id
        if new_id != old_id and new_id in self._containers:
            raise CallerError(f"container {new_id!r} exists already", code="already_exists")
        container.adopt(new_id, request.streams or Streams(), self._on_dialled)
        del self._containers[old_id]
        self._containers[new_id] = container
        running = container.init.state == process.RUNNING
        return AdoptContainerResponse(
            guest_pid=container.init.pid if running else 0,
            running=running,
            user_frozen=running and container not in self._to_thaw,
        )

    def forget_host(self) -> None:
        """The host is another one now: what the one before was resuming is not resumed."""
        if self.state in (DIALLING, RENEWING):
            self._answer = _to_nobody
            self._end(HELD, None)

    # -- going on

    def resume(self, request: ResumeGuestRequest, answer: Done) -> None:
        """Answers when all goes on; raises CallerError."""
        self._check_held("ResumeGuest")
        size = len(request.machine_id)
        if size not in (0, identity.MACHINE_ID_BYTES):
            raise CallerError(f"machine_id has {size} bytes; it must have 16, or none")
        guest = request.guest or ConfigureGuestRequest()
        self._set_guest = self._plan_guest(guest)
        self._machine_id, self._hostname = request.machine_id, guest.hostname
        self._begin(DIALLING, answer)
        self._timer = self._around.loop.call_later(process.DIAL_SECONDS, self._dial_deadline)
        self._on_dialled()

    def _dial_deadline(self) -> None:
        names = [
            f"{name} of {row.name}" for row in self._processes() for name in row.missing_streams
        ]
        text = f"{', '.join(names)} not dialled within {process.DIAL_SECONDS:.0f} s"
        self._end(HELD, HostError(text, code="deadline_exceeded"))

    def _on_dialled(self) -> None:
        if self.state != DIALLING or any(row.missing_streams for row in self._processes()):
            return
        self._stop_timer()
        self.state = RENEWING
        try:
            self._set_guest()
            if self._machine_id:
                self._renew_identity()
        except VmcellError as error:
            self._end(HELD, error)
        except OSError as error:
            self._end(HELD, HostError(f"ResumeGuest: {error}", code="internal"))
        else:
            if not self._machine_id:
                self._thaw()

    def _renew_identity(self) -> None:
        """In one child for all containers: a fork is what it costs."""
        machine_id, hostname, step = self._machine_id, self._hostname, self._step
        inits: list[int] = []
        residents = [_resident(row, inits) for row in self._containers.values()]

        def renewed(result: bytes | VmcellError) -> None:
            if self._step is step:
                self._on_renewed(result)

        try:
            self._around.errands.run(
                "renew the containers' identity",
                lambda: identity.renew(residents, machine_id, hostname),
                renewed,
                seconds=IDENTITY_SECONDS,
                keep=(*inits, *(row.mounts for row in residents if row.mounts >= 0)),
                most_bytes=identity.MOST_BYTES,
            )
        finally:
            for fd in inits:
                os.close(fd)

    def _on_renewed(self, result: bytes | VmcellError) -> None:
        try:
            if isinstance(result, VmcellError):
                raise result
            self._around.pod.renew_boot_id()
        except VmcellError as error:
            self._end(HELD, error)
            return
        for line in result.decode("utf-8", "replace").splitlines():
            self._around.log(line)
        self._thaw()

    def _thaw(self) -> None:
        self.state = THAWING
        for row in self._processes():
            row.go_on()
        known = self._containers.values()
        to_thaw, self._to_thaw = [row for row in self._to_thaw if row in known], []
        self._set_frozen(to_thaw, False, lambda error: self._end(RUNNING, error))

    def let_go(self) -> None:
        """The machine is shut down: streams hand over what is said at the end."""
        for row in self._processes():
            row.go_on()


def _resident(container: Container, inits: list[int]) -> identity.Resident:
    init = -1
    if container.has_own_hostname and container.init.state == process.RUNNING:
        with attempt(f"open the init of {container.name}"):
            init = os.pidfd_open(container.init.pid)
        inits.append(init)
    return identity.Resident(container.name, container.files.namespace, init)


def settle() -> None:
    """Memory is left as it is from here on, as far as that can be: each page that a restored guest
    writes to, every clone has a copy of. What a restored guest needs is loaded now, and the
    collector, which writes to all it looks at, never looks at what lives now again."""
    from vmcell_agent import limits, readdress, renewal  # noqa: F401

    gc.collect()
    gc.freeze()


def write_back(places: list[tuple[str, str]], drop_caches: bool) -> bytes:
    """What containers have written goes to their disks, in a child of the agent's. `places`: whose
    files, and a directory of the file system."""
    for name, path in places:
        with attempt(f"write back the files of {name}"):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                syscalls.syncfs(fd)
            finally:
                os.close(fd)
    if drop_caches:
        os.sync()
        # What falls free is reported to the host in blocks of pages, hence the second one.
        for file, value in (("drop_caches", b"3"), ("compact_memory", b"1")):
            with attempt(f"write {value.decode()} to {VM_DIRECTORY}/{file}"):
                fd = os.open(f"{VM_DIRECTORY}/{file}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, value)
                finally:
                    os.close(fd)
    return b""


def _to_nobody(result: VmcellError | None) -> None:
    """Who asked is gone."""


def _nothing() -> None:
    """Before the first ResumeGuest."""
