"""One process of a container, from its declaration to the answer of WaitProcess.

    DECLARED --start--> DIALLING --every stream is there--> SPAWNING --it runs--> RUNNING
    DIALLING --deadline--> FAILED        SPAWNING --the child reports an error--> FAILED
    DECLARED --signal--> ENDED           RUNNING --reaped--> ENDED
    FAILED, ENDED --delete--> (forgotten)

`answer` callbacks take the message or the error; each is called once.
"""

from __future__ import annotations

import os
import signal
import time

from vmcell_agent import report
from vmcell_agent.eventloop import READABLE
from vmcell_agent.record import Record
from vmcell_agent.spawn import Window
from vmcell_agent.stdio import StandardStreams
from vmcell_protos.agent import Streams
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop, Timer
    from vmcell_agent.ociprocess import ProcessSpec
    from vmcell_agent.report import Report
    from vmcell_agent.spawn import Child
    from vmcell_agent.streamdoor import StreamDoor

DECLARED, DIALLING, SPAWNING, RUNNING = "declared", "dialling", "spawning", "running"
ENDED, FAILED = "ended", "failed"
DIAL_SECONDS = 10.0
# A reader that takes nothing for this long no longer delays the news that the program has ended;
# what it has not taken stays there until DeleteProcess.
SETTLE_SECONDS = 2.0
MAX_WAITERS = 64
# Ignored by default, or stopping what does not run yet.
_HARMLESS_SIGNALS = frozenset(
    (
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    )
)


class Exit(Record):
    """How a process ended: code or 128 + signal, and when."""

    status: int
    unix_ns: int


def exit_status(wait_status: int) -> int:
    """waitpid's status as a shell shows it."""
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


class Process:
    """Owns its streams and the report channel; the container owns the process."""

    def __init__(
        self,
        loop: Loop,
        door: StreamDoor,
        name: str,
        spec: ProcessSpec,
        streams: Streams,
        *,
        says_ready: bool = False,
        told: Callable[[Report], None] | None = None,
    ) -> None:
        """`name` is for errors; `says_ready`: it runs only once it has reported "R" (envd); `told`
        gets the reports "T" and "N", which an init makes."""
        self.name = name
        self.spec = spec
        self.streams = streams
        self.window = Window(spec.rows, spec.columns)
        self.state = DECLARED
        self.pid = 0
        self.exit: Exit | None = None
        self._loop = loop
        self._door = door
        self._says_ready = says_ready
        self._told = told
        self._stdio = StandardStreams(loop, door, streams, self._changed)
        self._spawn: Callable[[], Child] | None = None
        self._started: Callable[[int | VmcellError], None] | None = None
        self._start_over: list[Callable[[], None]] = []
        self._waiters: list[Callable[[Exit | VmcellError], None]] = []
        self._child: Child | None = None
        self._ready = False
        self._timer: Timer | None = None

    def start(
        self, spawn: Callable[[], Child], answer: Callable[[int | VmcellError], None]
    ) -> None:
        """Run `spawn` once every stream is there; answers with the pid or an error."""
        if self.state != DECLARED:
            raise CallerError(
                f"{self.name} is {self.state}; it can be started once", code="failed_precondition"
            )
        self._spawn, self._started = spawn, answer
        self.state = DIALLING
        self._timer = self._loop.call_later(DIAL_SECONDS, self._dial_deadline)
        self._changed()

    def when_not_starting(self, tell: Callable[[], None]) -> None:
        """Call `tell` once, when no start is under way: at once, or when it is over."""
        if self._started is None:
            tell()
        else:
            self._start_over.append(tell)

    def wait(self, answer: Callable[[Exit | VmcellError], None]) -> None:
        """Answers when the process has ended and its output is handed over."""
        if len(self._waiters) >= MAX_WAITERS:
            raise CallerError(
                f"{self.name} has {MAX_WAITERS} waiters already", code="resource_exhausted"
            )
        self._waiters.append(answer)
        self._answer_waiters()

    def signal(self, number: int) -> None:
        """Send a signal; to a process not yet started it does what it does by default (signal(7)):
        it ends unstarted, or nothing happens."""
        if self.state == DECLARED:
            if number not in _HARMLESS_SIGNALS:
                self._stdio.close()
                self._end(128 + number)
        elif self.state in (SPAWNING, RUNNING):
            os.kill(self.pid, number)
        elif self.state == DIALLING:
            self._fail(CallerError(f"{self.name} was killed while starting", code="aborted"))
        else:
            raise CallerError(f"{self.name} has ended already", code="not_found")

    def resize(self, rows: int, columns: int) -> None:
        if not self.streams.terminal:
            raise CallerError(f"{self.name} has no terminal to resize", code="failed_precondition")
        self.window = Window(rows, columns)
        self._stdio.resize(rows, columns)

    def close_input(self) -> None:
        self._stdio.close_input()

    @property
    def dropped_bytes(self) -> int:
        """Output that had no reader any more."""
        return self._stdio.dropped_bytes

    # -- standing still, and going on

    def park_streams(self) -> None:
        self._stdio.park()

    def adopt_streams(self, streams: Streams, dialled: Callable[[], None]) -> None:
        """While they are parked: the streams that a process is to have from `go_on` on, of which
        `dialled` tells; for one that is not started yet, those that its start waits for. Raises
        CallerError."""
        if self.state != DECLARED:
            self._stdio.adopt(streams, dialled)
            return
        self._stdio.close()
        self._stdio = StandardStreams(self._loop, self._door, streams, self._changed)
        self._stdio.park()
        self.streams = streams

    @property
    def missing_streams(self) -> list[str]:
        """Adopted streams that are yet to be dialled before the process can go on."""
        return [] if self.state == DECLARED else self._stdio.missing

    def go_on(self) -> None:
        """Idempotent."""
        self._stdio.go_on()

    def leave(self, ended: Callable[[], None]) -> None:
        """While the streams are parked: nobody asks for it by its name any more. Its output will be
        dropped and its input end; `ended` is called at its end, or when it is closed."""
        gone = CallerError(f"{self.name} was left behind by an adoption", code="not_found")
        for answer in self._take_waiters():
            answer(gone)
        self._stdio.adopt(Streams(), lambda: None)
        self._waiters.append(lambda _: ended())

    def forget_host(self) -> None:
        """The host is another one now: nobody dials what was declared, nobody waits any more."""
        self._stdio.forget_host()
        self._waiters.clear()

    # -- the end of it

    def close(self) -> None:
        """Forget everything; whoever still waits gets an error. Idempotent."""
        self._stop_timer()
        self._close_channel()
        self._stdio.close()
        gone = CallerError(f"{self.name} was deleted", code="not_found")
        if self._started is not None:
            self._tell_started(gone)
        for answer in self._take_waiters():
            answer(gone)

    def reaped(self, wait_status: int) -> None:
        """The kernel says it ended; called once, for the pid that `spawn` returned."""
        while self.state == SPAWNING and self._take_report():
            pass
        if self.state == RUNNING:
            self._end(exit_status(wait_status))

    # -- dialling and spawning

    def _changed(self) -> None:
        if self.state == DIALLING and not self._stdio.missing:
            self._stop_timer()
            self._launch()
        elif self.state == ENDED:
            self._answer_waiters()

    def _dial_deadline(self) -> None:
        names = ", ".join(self._stdio.missing)
        self._fail(
            HostError(
                f"{names} of {self.name} not dialled within {DIAL_SECONDS:.0f} s",
                code="deadline_exceeded",
            )
        )

    def _launch(self) -> None:
        assert self._spawn is not None
        self.state = SPAWNING
        try:
            child = self._spawn()
        except VmcellError as error:
            self._fail(error)
            return
        self._child, self.pid = child, child.pid
        self._stdio.connect_pipes(child.stdin, child.stdout, child.stderr)
        self._loop.watch(child.channel.fileno(), READABLE, self._on_report)

    def _on_report(self, events: int) -> None:
        self._take_report()

    def _take_report(self) -> bool:
        """Take one packet; False when there was none."""
        if self._child is None:
            return False
        try:
            packet = report.receive(self._child.channel)
        except BlockingIOError:
            return False
        if packet.kind == "P":
            self._take_terminal(packet.descriptor)
        elif packet.kind in ("T", "N") and self._told is not None:
            self._told(packet)
        elif packet.kind == "R":
            self._ready = True
            self._run()
        elif packet.kind == "E" and packet.error is not None:
            self._fail(packet.error)
        elif self._says_ready and not self._ready:
            self._fail(HostError(f"{self.name} ended before it was ready", code="internal"))
        else:
            self._run()
        return True

    def _take_terminal(self, master: int) -> None:
        try:
            self._stdio.connect_terminal(master)
        except VmcellError as error:
            os.close(master)
            os.kill(self.pid, signal.SIGKILL)
            self._fail(error)

    def _run(self) -> None:
        self._close_channel()
        self.state = RUNNING
        if self.window.rows or self.window.columns:  # it may have been resized since the fork
            self._stdio.resize(self.window.rows, self.window.columns)
        self._tell_started(self.pid)

    def _fail(self, error: VmcellError) -> None:
        self._stop_timer()
        self._close_channel()
        self.state = FAILED
        self._stdio.close()
        self._tell_started(error)
        for answer in self._take_waiters():
            answer(error)

    def _tell_started(self, result: int | VmcellError) -> None:
        answer, self._started = self._started, None
        if answer is not None:
            answer(result)
        over, self._start_over = self._start_over, []
        for tell in over:
            tell()

    def _close_channel(self) -> None:
        if self._child is not None:
            self._loop.unwatch(self._child.channel.fileno())
            self._child.channel.close()
            self._child = None

    # -- the end

    def _end(self, status: int) -> None:
        self.state = ENDED
        self.exit = Exit(status, time.time_ns())
        self._stdio.program_ended()
        self._restart_timer()
        self._answer_waiters()

    def _restart_timer(self) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(SETTLE_SECONDS, self._settling_deadline)

    def _settling_deadline(self) -> None:
        if self._stdio.parked:  # no reader could take anything
            self._restart_timer()
        else:
            self._give_up_settling()

    def _give_up_settling(self) -> None:
        for answer in self._take_waiters():
            assert self.exit is not None
            answer(self.exit)

    def _answer_waiters(self) -> None:
        if self.state == FAILED:
            error = CallerError(f"{self.name} never started", code="failed_precondition")
            for answer in self._take_waiters():
                answer(error)
        elif self.state == ENDED:
            if self._stdio.settled:
                self._stop_timer()
                self._give_up_settling()
            else:
                self._restart_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _take_waiters(self) -> list[Callable[[Exit | VmcellError], None]]:
        waiters, self._waiters = self._waiters, []
        return waiters
