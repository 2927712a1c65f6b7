"""The states of a guest that is saved and resumed, with containers that answer when the test says:
no order of calls, answers and errors leaves anything that runs frozen, or what is saved moving."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmcell_agent import process, snapshot
from vmcell_agent.container import Container, Surroundings
from vmcell_agent.eventloop import Loop
from vmcell_agent.snapshot import HELD, RUNNING, Snapshot
from vmcell_protos.agent import ConfigureGuestRequest, ResumeGuestRequest
from vmcell_protos.errors import CallerError, HostError, VmcellError

ID = bytes(range(16))
Answer = Callable[[Any], None]


class FakeFreezer:
    """Freezes and thaws when `settle` is called; keeps to what Freezer promises."""

    def __init__(self) -> None:
        self.frozen = False
        self.waiters: list[Answer] = []

    def set(self, frozen: bool, answer: Answer) -> None:
        if frozen != self.frozen:
            self.frozen = frozen
            self.tell(CallerError("the other way meanwhile", code="aborted"))
        self.waiters.append(answer)

    def tell(self, result: VmcellError | None) -> None:
        waiters, self.waiters = self.waiters, []
        for answer in waiters:
            answer(result)

    def overrun(self) -> None:
        """Not frozen in time: taken back, as Freezer does it."""
        self.frozen = False
        self.tell(HostError("did not freeze", code="deadline_exceeded"))


class FakeProcess:
    def __init__(self) -> None:
        self.name, self.pid, self.state = "init of container 'x'", 7, process.RUNNING
        self.parked = False
        self.missing_streams: list[str] = []
        self.starting: list[Callable[[], None]] | None = None

    def when_not_starting(self, tell: Callable[[], None]) -> None:
        if self.starting is None:
            tell()
        else:
            self.starting.append(tell)

    def park_streams(self) -> None:
        self.parked = True

    def go_on(self) -> None:
        self.parked = False


class FakeFiles:
    namespace = -1


class FakeContainer:
    has_own_hostname = False

    def __init__(self, name: str) -> None:
        self.id = self.name = name
        self.init = FakeProcess()
        self.freezer = FakeFreezer()
        self.files = FakeFiles()
        self.file_systems = [f"/{name}"]

    @property
    def processes(self) -> list[FakeProcess]:
        return [self.init]


class Bench:
    """A snapshot of two containers; it stands for the loop, the errands and the pod too."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.errands = self.pod = self
        self.lines: list[str] = []
        self.log = self.lines.append
        self.pending: list[Answer] = []
        self.refusal: VmcellError | None = None
        self.boot_ids = self.guests = 0
        self.containers = {name: FakeContainer(name) for name in ("a", "b")}
        self.snapshot = Snapshot(
            cast(Surroundings, self), cast("dict[str, Container]", self.containers), self.plan
        )
        self.answers: list[VmcellError | None] = []

    def plan(self, request: ConfigureGuestRequest) -> Callable[[], None]:
        def set_guest() -> None:
            self.guests += 1
            if request.unix_time_ns < 0:
                raise OSError(22, "Invalid argument")

        return set_guest

    def run(self, what: str, work: object, done: Answer, **how: object) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.pending.append(done)

    def renew_boot_id(self) -> None:
        self.boot_ids += 1

    def prepare(self, *, drop_caches: bool = False) -> None:
        self.snapshot.prepare(drop_caches, self.answers.append)

    def resume(self, machine_id: bytes = b"", unix_time_ns: int = 0) -> None:
        guest = ConfigureGuestRequest(unix_time_ns=unix_time_ns)
        request = ResumeGuestRequest(guest=guest, machine_id=machine_id)
        self.snapshot.resume(request, self.answers.append)

    def settle(self) -> None:
        """Everything answers well, until nothing waits."""
        while self.pending or any(row.freezer.waiters for row in self.containers.values()):
            for row in self.containers.values():
                row.freezer.tell(None)
            if self.pending:
                self.pending.pop(0)(b"")

    def expire(self) -> None:
        """The snapshot's timer, if it has one, goes off."""
        timer = self.snapshot._timer
        if timer is not None and timer.callback is not None:
            timer.callback()


def test_a_container_that_does_not_freeze_lets_all_go_on() -> None:
    bench = Bench()
    bench.prepare()
    bench.containers["a"].freezer.tell(None)
    bench.containers["b"].freezer.overrun()
    (error,) = bench.answers
    assert str(error) == "did not freeze"
    assert bench.snapshot.state == RUNNING
    assert not bench.containers["a"].freezer.frozen
    bench.settle()
    assert bench.answers == [error]
    bench.snapshot.check_goes_on()


def test_no_child_to_write_back_lets_all_go_on() -> None:
    bench = Bench()
    bench.refusal = CallerError("32 such calls", code="resource_exhausted")
    bench.prepare()
    bench.settle()
    assert bench.answers == [bench.refusal]
    assert bench.snapshot.state == RUNNING
    assert not any(row.freezer.frozen for row in bench.containers.values())


def test_caches_that_cannot_be_dropped_leave_a_saved_guest_saved() -> None:
    bench = Bench()
    bench.prepare()
    bench.settle()
    bench.prepare(drop_caches=True)
    bench.pending.pop()(HostError("no"))
    assert str(bench.answers[-1]) == "no"
    assert bench.snapshot.state == HELD
    assert all(row.freezer.frozen for row in bench.containers.values())
    bench.resume()
    bench.settle()
    assert not any(row.freezer.frozen for row in bench.containers.values())


def test_a_start_that_takes_too_long_and_comes_late() -> None:
    bench = Bench()
    starting: list[Callable[[], None]] = []
    bench.containers["a"].init.starting = starting
    bench.prepare()
    bench.expire()
    assert "still being started after 10 s" in str(bench.answers[0])
    bench.containers["a"].init.starting = None
    bench.prepare()  # under way when the first one's start is over
    starting.pop()()
    bench.settle()
    assert bench.answers[1:] == [None]
    assert bench.snapshot.state == HELD


def test_an_identity_that_comes_when_the_host_has_changed_thaws_nobody() -> None:
    bench = Bench()
    bench.prepare()
    bench.settle()
    bench.resume(ID)
    (renewed,) = bench.pending
    bench.pending.clear()
    bench.snapshot.forget_host()
    renewed(b"")
    assert bench.snapshot.state == HELD
    assert all(row.freezer.frozen and row.init.parked for row in bench.containers.values())
    assert bench.boot_ids == 0
    assert bench.answers == [None]  # of PrepareSnapshot
    bench.resume(ID)
    bench.settle()
    assert (bench.snapshot.state, bench.boot_ids, bench.answers) == (RUNNING, 1, [None, None])


def test_a_line_of_the_identitys_is_logged_and_an_error_is_one() -> None:
    bench = Bench()
    bench.prepare()
    bench.settle()
    bench.resume(ID)
    bench.pending.pop()(HostError("not done within 10 s", code="deadline_exceeded"))
    assert (bench.snapshot.state, str(bench.answers[-1])) == (HELD, "not done within 10 s")
    bench.resume(ID)
    bench.pending.pop()(b"container 'a': read-only\ncontainer 'b': full")
    bench.settle()
    assert bench.lines == ["container 'a': read-only", "container 'b': full"]
    assert bench.snapshot.state == RUNNING


def test_what_was_removed_meanwhile_is_not_thawed() -> None:
    bench = Bench()
    bench.prepare()
    bench.settle()
    gone = bench.containers.pop("a")
    bench.resume()
    bench.settle()
    assert gone.freezer.frozen
    assert bench.answers == [None, None]


def test_a_guest_that_cannot_be_set_stays_saved() -> None:
    bench = Bench()
    bench.prepare()
    bench.settle()
    bench.resume(unix_time_ns=-1)
    error = bench.answers[-1]
    assert error is not None
    assert (str(error), error.code) == ("ResumeGuest: [Errno 22] Invalid argument", "internal")
    assert bench.snapshot.state == HELD


class States(RuleBasedStateMachine):
    """Calls, answers, errors, deadlines and other hosts in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.users_frozen: set[str] = set()
        self.asked = self.told = self.refused = 0

    def ask(self, call: Callable[[Answer], None]) -> None:
        told: list[object] = []

        def answer(result: object) -> None:
            assert not told
            told.append(result)
            self.told += 1

        try:
            call(answer)
        except CallerError:
            self.refused += 1
            assert not told
        else:
            self.asked += 1

    @precondition(lambda self: self.bench.snapshot.state == RUNNING)
    @rule(name=st.sampled_from(["a", "b"]), frozen=st.booleans())
    def the_user_freezes(self, name: str, frozen: bool) -> None:
        freezer = self.bench.containers[name].freezer
        freezer.frozen = frozen
        freezer.tell(None)
        (self.users_frozen.add if frozen else self.users_frozen.discard)(name)

    @rule(drop_caches=st.booleans())
    def prepare(self, drop_caches: bool) -> None:
        self.ask(lambda answer: self.bench.snapshot.prepare(drop_caches, answer))

    @rule(machine_id=st.sampled_from([b"", ID]), missing=st.booleans(), bad=st.booleans())
    def resume(self, machine_id: bytes, missing: bool, bad: bool) -> None:
        if self.bench.snapshot.state == HELD:
            self.bench.containers["a"].init.missing_streams = ["stdout"] if missing else []
        guest = ConfigureGuestRequest(unix_time_ns=-1 if bad else 0)
        request = ResumeGuestRequest(guest=guest, machine_id=machine_id)
        self.ask(lambda answer: self.bench.snapshot.resume(request, answer))

    @rule()
    def a_stream_is_dialled(self) -> None:
        self.bench.containers["a"].init.missing_streams = []
        self.bench.snapshot._on_dialled()

    @rule()
    def the_host_changes(self) -> None:
        before = self.bench.snapshot.state
        self.bench.snapshot.forget_host()
        if before != self.bench.snapshot.state:
            assert before in (snapshot.DIALLING, snapshot.RENEWING)
            self.told += 1  # nobody is left to be told

    @rule(fails=st.booleans())
    def a_child_has_ended(self, fails: bool) -> None:
        if self.bench.pending:
            self.bench.pending.pop(0)(HostError("no") if fails else b"")

    @rule(name=st.sampled_from(["a", "b"]))
    def a_freezer_answers(self, name: str) -> None:
        self.bench.containers[name].freezer.tell(None)

    @precondition(lambda self: self.bench.snapshot.state == snapshot.PREPARING)
    @rule(name=st.sampled_from(["a", "b"]))
    def a_freezer_overruns(self, name: str) -> None:
        freezer = self.bench.containers[name].freezer
        if freezer.frozen and freezer.waiters and name not in self.users_frozen:
            freezer.overrun()

    @rule()
    def all_answer(self) -> None:
        self.bench.settle()

    @rule()
    def a_deadline_passes(self) -> None:
        self.bench.expire()

    @invariant()
    def what_is_saved_stands_and_what_runs_moves(self) -> None:
        state = self.bench.snapshot.state
        for name, row in self.bench.containers.items():
            if state == HELD:
                assert row.freezer.frozen
                assert row.init.parked
            if state == RUNNING:
                assert row.freezer.frozen == (name in self.users_frozen)
                assert not row.init.parked
        if state in (HELD, RUNNING):
            assert self.told == self.asked
        else:
            assert self.told == self.asked - 1

    def teardown(self) -> None:
        self.bench.settle()
        self.bench.containers["a"].init.missing_streams = []
        self.bench.snapshot._on_dialled()
        self.bench.settle()
        if self.bench.snapshot.state == HELD:
            self.resume(b"", missing=False, bad=False)
            self.bench.settle()
        assert self.bench.snapshot.state == RUNNING
        self.what_is_saved_stands_and_what_runs_moves()
        self.bench.loop.close()


TestStates = States.TestCase
TestStates.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_refusals_say_what_to_do() -> None:
    bench = Bench()
    with pytest.raises(CallerError, match="it must have been saved by PrepareSnapshot"):
        bench.resume()
    bench.prepare()
    with pytest.raises(CallerError, match="the guest is being saved already"):
        bench.prepare()
    with pytest.raises(CallerError, match="ResumeGuest comes first"):
        bench.snapshot.check_goes_on()
    bench.settle()
    bench.prepare()
    assert bench.answers == [None, None]


SETTLED = """
import gc, sys
from vmcell_agent import snapshot
assert "vmcell_agent.renewal" not in sys.modules, "boot does not need it"
snapshot.settle()
names = ("limits", "readdress", "renewal")
print([name for name in names if f"vmcell_agent.{name}" in sys.modules])
print(gc.get_freeze_count() > 0)
"""


def test_a_guest_that_is_saved_has_loaded_what_one_that_is_restored_needs() -> None:
    """Else every clone unpacks it again, into memory of its own; and the collector would write to
    all objects there are. In an interpreter of its own: this one has long loaded all of it."""
    done = subprocess.run([sys.executable, "-c", SETTLED], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['limits', 'readdress', 'renewal']", "True"], done.stderr
