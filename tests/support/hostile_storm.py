"""One seed of the hostile payload against one VMM process, and what is asked of that process.

It may be running at the end, or have ended for a reason of the guest's own. It may not crash, hang,
grow, log without bound, change a file that is not the guest's, or let its shim wait.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from hostile_payload import MEMORY_MIB, SECOND_ENTRY_GPA, Order, kernel
from hostile_surroundings import IMAGE_NAME, Surroundings
from run_queue import waits_of_answer, waits_of_end
from tap_lines import TapLine

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime import handle as handle_module
from vmcell_runtime.devices.console import LOG_LIMIT_BYTES
from vmcell_runtime.handle import SavedFiles, VmmExit, VmmHandle, launch

MAX_GROWTH_KIB = 8 << 10
# Twenty times as much where QEMU's software CPU runs the kernel that the VMM stands on.
MAX_LATENCY_S = 2.0 if "QEMU TCG CPU" in Path("/proc/cpuinfo").read_text() else 0.1
MAX_LOG_BYTES = 64 << 10
TICK_S = 0.4
ENDS_S = 10.0
MAY_END_S = 2.0
TELLS_S = 20.0
ENDINGS = (
    *(Order.STORM, Order.NOTIFY_STORM, Order.RESET_LINE, Order.TRIPLE_FAULT, Order.SPIN),
    *(Order.INTERRUPTS, Order.RESET_PROCESSOR, Order.SLEEP, Order.HEAVY),
)
_OWN_FAULTS = ("triple_fault", "guest_fault")
# What the guest may bring about by these orders; by any other it brings about nothing.
_REASONS: dict[Order, tuple[str, ...]] = {
    Order.RESET_LINE: ("guest_reset",),
    Order.TRIPLE_FAULT: ("triple_fault",),
    Order.INTERRUPTS: _OWN_FAULTS,
    Order.RESET_PROCESSOR: _OWN_FAULTS,
}
_MAY_END = (Order.INTERRUPTS, Order.RESET_PROCESSOR)  # or not, as the processor likes


class LateError(Exception):
    """The VMM let its shim wait."""


@dataclass
class Outcome:
    """How one seed went; `problems` and `late` are empty if all was as it must be.

    What was `late` may have been the machine's fault.
    """

    seed: int
    ending: Order
    problems: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    answers_s: list[float] = field(default_factory=list)
    kill_s: float | None = None
    growth_kib: int = 0
    told: str = ""
    end: VmmExit | None = None
    log: str = ""
    console: bytes = b""

    def __str__(self) -> str:
        kill = f"{self.kill_s * 1e3:.1f}" if self.kill_s is not None else "-"
        return (
            f"seed {self.seed} ({self.ending.name}): pause {_worst_ms(self.pauses_s)} ms, answer "
            f"{_worst_ms(self.answers_s)} ms, kill {kill} ms, growth {self.growth_kib} KiB, log "
            f"{len(self.log)} bytes, end {self.end}, {' '.join(self.told.split())}"
        )

    def report(self) -> str:
        """Everything one needs to look for the reason."""
        problems = "\n".join(self.problems + self.late)
        return f"{self}\n{problems}\n--- log\n{self.log}\n--- console\n{self.console[-4096:]!r}"


def _worst_ms(times_s: list[float]) -> str:
    return f"{max(times_s) * 1e3:.1f}" if times_s else "-"


class Plan(NamedTuple):
    """One seed for `seconds`; `share` is a directory to be served, or None.

    `breakage` is Python that the VMM process runs first, to see that what it breaks is found.
    """

    built: bytes
    seed: int
    seconds: float
    line: TapLine
    share: Path | None
    breakage: str = "pass"


class Storm:
    """What `plan` says; `run` once."""

    def __init__(self, plan: Plan) -> None:
        built, seed, self._seconds, line, share, _ = plan
        self._random = random.Random(seed)
        self._opened = ExitStack()
        image = kernel(built, seed, flood=seed % 8 == 7)
        self._around = Surroundings(self._opened, image, line, share, seed)
        self._log_fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_APPEND, 0o600)
        self._opened.callback(os.close, self._log_fd)
        self._saves = share is None and seed % 4 == 1
        self._saved: SavedFiles | None = None
        self._vmm: VmmHandle | None = None
        self._first_kib = 0
        self.outcome = Outcome(seed, _ending(seed))

    def run(self) -> Outcome:
        """All of it; nothing is left afterwards."""
        outcome = self.outcome
        with self._opened:
            try:
                vmm = self._launch(None)
                self._rage(vmm)
                self._end(vmm)
                if self._saved is not None:
                    self._go_on_from(self._saved)
            except (HostError, AssertionError, OSError) as error:
                # OSError: a process that is gone, or that did not end in time
                if not self._hurt_itself():
                    outcome.problems.append(f"{type(error).__name__}: {error}")
            except LateError as error:
                outcome.late.append(str(error))
            outcome.problems += self._around.changes()
            outcome.console = self._around.console
            outcome.log = os.pread(self._log_fd, 16 << 20, 0).decode(errors="replace")
        self._check_output()
        return outcome

    def _hurt_itself(self) -> bool:
        """A device has written over the guest's own code, for example: it may do that."""
        if self._vmm is None:
            return False
        try:
            end = self._vmm.wait_exit(1.0)
        except TimeoutError:
            return False
        if end.reason not in _OWN_FAULTS:
            self.outcome.problems.append(f"it ended as {end}")
            return False
        self.outcome.end = end
        self.outcome.told += f"; hurt itself: {end.reason}"
        return True

    def _launch(self, saved: SavedFiles | None) -> VmmHandle:
        around = self._around
        vmm = self._vmm = launch(around.config, around.fds, log_fd=self._log_fd, saved=saved)
        self._opened.callback(vmm.close)
        around.started()
        self._first_kib = own_kib(vmm.pid)
        return vmm

    # The storm

    def _rage(self, vmm: VmmHandle) -> None:
        self._await_console(b"\nBEGUN\n", TELLS_S)
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            self._around.stir(vmm)
            self._measure(vmm)
            self._weigh(vmm)
            still_runs(vmm, TICK_S * self._random.random())
            if self._saves and self._saved is None and time.monotonic() > end - self._seconds / 2:
                self._saved = self._save(vmm)
        vmm.set_balloon(Order.TELL)
        self._await_console(b"\nTOLD\n", TELLS_S)
        self.outcome.told = self._told()

    def _measure(self, vmm: VmmHandle) -> None:
        outcome = self.outcome
        waits = waits_of_answer(vmm.pid, vmm._reader.native_id or 0)
        for call, times_s in (
            (vmm.balloon, outcome.answers_s),
            (vmm.pause, outcome.pauses_s),
            (vmm.resume, outcome.answers_s),
        ):
            waited_s, start = waits.waited_s, time.monotonic()
            call()
            took_s = time.monotonic() - start
            times_s.append(max(0.0, took_s - (waits.waited_s - waited_s)))
            if times_s[-1] > MAX_LATENCY_S:
                raise LateError(f"{call.__name__} took {times_s[-1] * 1e3:.0f} ms")

    def _weigh(self, vmm: VmmHandle) -> None:
        outcome = self.outcome
        growth_kib = own_kib(vmm.pid) - self._first_kib
        outcome.growth_kib = max(outcome.growth_kib, growth_kib)
        assert growth_kib <= MAX_GROWTH_KIB, f"the VMM has grown by {growth_kib} KiB"

    def _save(self, vmm: VmmHandle) -> SavedFiles:
        """The guest as it stands, with all it has made of its devices."""
        self._around.unplug_all(vmm)
        memory_fd, state_fd = os.memfd_create("memory"), os.memfd_create("state")
        for fd in (memory_fd, state_fd):
            self._opened.callback(os.close, fd)
        os.truncate(memory_fd, MEMORY_MIB << 20)
        vmm.pause()
        vmm.save(memory_fd, state_fd)
        vmm.resume()
        return SavedFiles(memory_fd, state_fd)

    def _go_on_from(self, saved: SavedFiles) -> None:
        """The same guest in another process: it rages on, or is refused for what it has done."""
        try:
            vmm = self._launch(saved)
        except CallerError as error:
            self.outcome.told += f"; its snapshot was refused: {error}"
            return
        vmm.resume()
        for _ in range(5):
            self._measure(vmm)
            still_runs(vmm, TICK_S * self._random.random())
        self._kill(vmm)
        self.outcome.told += "; went on from its snapshot"

    # The end

    def _end(self, vmm: VmmHandle) -> None:
        ending = self.outcome.ending
        if ending is not Order.STORM:
            vmm.set_balloon(ending)
        if ending in _REASONS:
            self._own_end(vmm, ending)
            return
        self._await_order(vmm, ending)
        for _ in range(20):
            self._measure(vmm)
            still_runs(vmm, 0.02)
        self._weigh(vmm)
        self._kill(vmm)

    def _own_end(self, vmm: VmmHandle, ending: Order) -> None:
        reasons = _REASONS[ending]
        try:
            end = vmm.wait_exit(MAY_END_S if ending in _MAY_END else ENDS_S)
        except TimeoutError:
            vmm.kill()
            end = vmm.wait_exit(ENDS_S)
            if ending in _MAY_END:
                reasons = (*reasons, "killed")
        self.outcome.end = end
        if end.reason not in (*reasons, *_OWN_FAULTS):
            self.outcome.problems.append(f"it ended as {end}")

    def _await_order(self, vmm: VmmHandle, ending: Order) -> None:
        deadline = time.monotonic() + ENDS_S
        while ending is not Order.STORM and vmm.balloon().actual_mib != ending:
            assert time.monotonic() < deadline, f"the guest did not take the order {ending.name}"
            still_runs(vmm, 0.02)

    def _kill(self, vmm: VmmHandle) -> None:
        waits, start = waits_of_end(), time.monotonic()
        vmm.kill()
        self.outcome.end = vmm.wait_exit(ENDS_S)
        took_s = time.monotonic() - start - waits.waited_s
        self.outcome.kill_s = max(self.outcome.kill_s or 0.0, took_s)
        if self.outcome.end.reason not in ("killed", *_OWN_FAULTS):
            self.outcome.problems.append(f"it ended as {self.outcome.end} instead of being killed")
        if took_s > MAX_LATENCY_S:
            raise LateError(f"kill took {took_s * 1e3:.0f} ms")

    # What it left

    def _check_output(self) -> None:
        outcome = self.outcome
        if "Traceback" in outcome.log:
            outcome.problems.append("an exception that is not the guest's fault is in the log")
        if len(outcome.log) > MAX_LOG_BYTES:
            outcome.problems.append(f"the log has {len(outcome.log)} bytes")
        if len(outcome.console) > LOG_LIMIT_BYTES + 100:
            outcome.problems.append(f"the console's file has {len(outcome.console)} bytes")

    def _await_console(self, text: bytes, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in (console := self._around.console):
            if b"console log is full" in console:
                return  # and nothing more comes
            assert time.monotonic() < deadline, f"the guest did not say {text!r}"
            time.sleep(0.02)

    def _told(self) -> str:
        console = self._around.console
        start = console.rfind(b"\nSTORM")
        return console[start:].decode(errors="replace") if start >= 0 else ""


def run_at_once(plans: list[Plan]) -> list[Outcome]:
    """Each storm in a process of its own; who was late has a second try.

    Threads of one process would wait for each other's interpreter lock. What else the machine does
    can make a VMM late, but hardly twice; a VMM at fault is late again.
    """
    outcomes = _run_once(plans)
    again = [n for n, outcome in enumerate(outcomes) if outcome.late and not outcome.problems]
    for number, outcome in zip(again, _run_once([plans[n] for n in again]), strict=True):
        outcome.told += f"; was late once: {outcomes[number].late}"
        outcomes[number] = outcome
    return outcomes


def _run_once(plans: list[Plan]) -> list[Outcome]:
    forks = multiprocessing.get_context("fork")
    running = []
    for plan in plans:
        ours, theirs = forks.Pipe(duplex=False)
        process = forks.Process(target=_run_and_tell, args=(plan, theirs))
        process.start()
        theirs.close()
        running.append((plan, process, ours))
    outcomes = []
    for plan, process, pipe in running:
        try:
            outcomes.append(pipe.recv())
        except EOFError:
            process.join()
            problem = f"the test's own process ended with {process.exitcode}"
            outcomes.append(Outcome(plan.seed, _ending(plan.seed), [problem]))
        process.join()
        process.close()
        pipe.close()
    return outcomes


def _run_and_tell(plan: Plan, pipe: Connection) -> None:
    handle_module._BOOTSTRAP = _bootstrap(plan.breakage)
    pipe.send(Storm(plan).run())


def _ending(seed: int) -> Order:
    return ENDINGS[seed % len(ENDINGS)]


def still_runs(vmm: VmmHandle, seconds: float) -> None:
    """Lets that time pass; AssertionError if the VMM ends meanwhile."""
    try:
        end = vmm.wait_exit(seconds)
    except TimeoutError:
        return
    raise AssertionError(f"the VMM ended: {end}")


def own_kib(pid: int) -> int:
    """Resident memory of a VMM without its guest's RAM and images."""
    resident = total = 0
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
        elif words[0] == "Rss:":
            resident = int(words[1])
        elif words[0] == "VmFlags:":  # the last of each mapping; dd: left out of core dumps
            total += resident if "dd" not in words and IMAGE_NAME not in name else 0
    return total


def _bootstrap(breakage: str) -> str:
    """Starts a VMM process whose machine lets a payload's second vCPU begin with the first."""
    support = os.path.dirname(os.path.abspath(__file__))
    first = f"sys.path.append({support!r}); import second_vcpu; "
    first += f"second_vcpu.install({SECOND_ENTRY_GPA:#x}); {breakage}; main("
    return handle_module._BOOTSTRAP.replace("main(", first)
