"""Task calls in any order, legal and illegal, against the real shim server with a fake guest.

A model (`contract_model`) predicts each answer and the events. VMCELL_CONTRACT_CALLS says how many
calls are made; `make test-long` makes two hours' worth, at five calls a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from contract_model import (
    HARMLESS,
    KILLED,
    LAST_SIGNAL,
    OK,
    RUNNING,
    STATUS,
    STOPPED,
    ContractModel,
    seen_events,
)
from contract_model import ModelProcess as Expected
from contract_program import MISSING, SHORT, WAITS, Census, Program
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from shim_harness import DEADLINE_S, Shim, running_shim, wait_until

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_protos.wellknown import Any as AnyMessage
from vmcell_protos.wellknown import Empty
from vmcell_protos.wire import Message
from vmcell_shim import container, events

M = TypeVar("M", bound=Message)

CALLS = int(os.environ.get("VMCELL_CONTRACT_CALLS", "250"))
STEPS = 30
MOST_WAITERS = 3
WAIT_DEADLINE_S = 300.0
# c1 is mostly asked for, so that most sequences get somewhere.
CONTAINERS = st.sampled_from(["c1", "c1", "c1", "c1", "c1", "c2"])
PROCESSES = st.sampled_from(["", "", "e1", "e2"])
DEADLY = (1, 9, 10, 15)
SIGNALS = st.sampled_from([*DEADLY, *HARMLESS, LAST_SIGNAL + 1])
EXIT_STATUSES = st.integers(0, 255)

PROGRAMS = st.sampled_from([WAITS, WAITS, WAITS, SHORT, MISSING])


class ContractMachine(RuleBasedStateMachine):
    """One shim; each rule is a call, or several at once, or something that happens to the guest."""

    calls_made = 0

    @initialize(steps=st.integers(0, 4))
    def begin(self, steps: int) -> None:
        self.census = Census()
        self.directory = Path(tempfile.mkdtemp(prefix="vmcell-c"))
        self.stack = contextlib.ExitStack()
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(container, "_EXECS_END_S", 0.5)
        patch.setattr(events, "_LONGEST_DELAY_S", 0.1)
        self.pool = self.stack.enter_context(ThreadPoolExecutor(4))
        self.shim: Shim = self.stack.enter_context(running_shim(self.directory, patch))
        self.model = ContractModel()
        self.programs: list[Program] = []
        self.waiting = self.stack.enter_context(ThreadPoolExecutor(MOST_WAITERS))
        self.waiters: list[tuple[Expected, Future[tuple[str, task.WaitResponse | None]]]] = []
        self.containerd_is_up = True
        for _ in range(steps):
            self.go_on(0)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        try:
            self._end_everything()
        finally:
            self.stack.close()
            for program in self.programs:
                program.close()
            shutil.rmtree(self.directory)
        self.census.check()

    def _end_everything(self) -> None:
        if not self.containerd_is_up:
            self.restart_containerd()
        for name in list(self.model.tasks):
            process = self.model.find(name)
            assert process is not None
            if process.state == RUNNING:
                self._kill(name, "", 9, everyone=False)
            self._delete(name, "")
        self._collect_waiters(lambda process: True)
        wait_until(lambda: len(self.shim.containerd.topics()) >= self.model.event_count, "events")
        self.model.check_events(seen_events(self.shim.containerd.events))
        assert self.shim.left_behind() == []

    # ---- asking ---------------------------------------------------------------------------------

    def _ask(
        self, method: str, request: Message, answer: type[M], timeout_s: float = DEADLINE_S
    ) -> tuple[str, M | None]:
        """(OK or the code, the answer)."""
        ContractMachine.calls_made += 1
        try:
            version = 2 + self.calls_made % 2
            return OK, self.shim.call(method, request, answer, timeout_s, version)
        except VmcellError as error:
            if error.code == "deadline_exceeded":
                pytest.fail(f"{method} hangs: {error}")
            return error.code, None

    def _expect(self, method: str, request: Message, answer: type[M], code: str) -> M | None:
        got, response = self._ask(method, request, answer)
        assert got == code, f"{method} of {request} answers {got} instead of {code}"
        return response

    def _request(self, method: str, name: str, process: str = "") -> tuple[Message, type[Message]]:
        """A call that only asks, for any state."""
        requests: dict[str, tuple[Message, type[Message]]] = {
            "State": (task.StateRequest(id=name, exec_id=process), task.StateResponse),
            "Pids": (task.PidsRequest(id=name), task.PidsResponse),
            "Connect": (task.ConnectRequest(id=name), task.ConnectResponse),
            "Stats": (task.StatsRequest(id=name), task.StatsResponse),
            "Start": (task.StartRequest(id=name, exec_id=process), task.StartResponse),
            "Delete": (task.DeleteRequest(id=name, exec_id=process), task.DeleteResponse),
            "Kill": (task.KillRequest(id=name, exec_id=process, signal=9), Empty),
            "CloseIO": (task.CloseIORequest(id=name, exec_id=process, stdin=True), Empty),
            "ResizePty": (
                task.ResizePtyRequest(id=name, exec_id=process, width=80, height=24),
                Empty,
            ),
        }
        return requests[method]

    def _program(self, args: tuple[str, ...], terminal: bool) -> Program:
        program = Program(self.directory, len(self.programs), args, terminal)
        self.programs.append(program)
        return program

    def _create_request(self, name: str, program: Program) -> task.CreateTaskRequest:
        return task.CreateTaskRequest(
            id=name,
            bundle=str(self.shim.bundle(list(program.args))),
            stdin=program.stdin,
            stdout=program.stdout,
            terminal=program.terminal,
        )

    # ---- rules: one call ------------------------------------------------------------------------

    @rule(name=CONTAINERS, args=PROGRAMS, terminal=st.booleans())
    def create(self, name: str, args: tuple[str, ...], terminal: bool) -> None:
        code = self.model.answer_create(name)
        program = self._program(args, terminal and args is WAITS)
        request = self._create_request(name, program)
        response = self._expect("Create", request, task.CreateTaskResponse, code)
        if response is not None:
            assert response.pid > 0
            self.model.create(name, program)

    @rule(
        name=CONTAINERS,
        process=st.sampled_from(["", "e1", "e1", "e2", "e2"]),
        args=PROGRAMS,
        terminal=st.booleans(),
    )
    def add_exec(self, name: str, process: str, args: tuple[str, ...], terminal: bool) -> None:
        program = self._program(args, terminal and args is WAITS)
        request = task.ExecProcessRequest(
            id=name,
            exec_id=process,
            spec=AnyMessage(value=json.dumps({"args": args, "cwd": "/"}).encode()),
            stdin=program.stdin,
            stdout=program.stdout,
            terminal=program.terminal,
        )
        code = self.model.answer_exec(name, process) if process else "invalid_argument"
        if self._expect("Exec", request, Empty, code) is not None:
            self.model.add_exec(name, process, program)

    @rule(name=CONTAINERS, process=PROCESSES)
    def start(self, name: str, process: str) -> None:
        code = self.model.answer("Start", name, process)
        found = self.model.find(name, process)
        if code != OK or found is None:
            self._expect(*self._with_code("Start", name, process, code))
            return
        program = self._program_of(found)
        if program.args is MISSING:
            code = "failed_precondition" if found.failed else "invalid_argument"
            self._expect(*self._with_code("Start", name, process, code))
            self.model.start_failed(name, process)
            self._settle(name)
            return
        self._expect(*self._with_code("Start", name, process, OK))
        self._started(name, process, found)

    @rule(name=CONTAINERS, process=PROCESSES, number=SIGNALS, everyone=st.booleans())
    def kill(self, name: str, process: str, number: int, everyone: bool) -> None:
        self._kill(name, process, number, everyone=everyone and not process)

    @rule(name=CONTAINERS, process=PROCESSES)
    def delete(self, name: str, process: str) -> None:
        self._delete(name, process)

    @rule(name=CONTAINERS, process=PROCESSES)
    def close_io(self, name: str, process: str) -> None:
        code = self.model.answer("CloseIO", name, process)
        self._expect(*self._with_code("CloseIO", name, process, code))
        found = self.model.find(name, process)
        if found is not None:
            found.input_ended = True
            self._end_of_input(name, process, found)

    @rule(name=CONTAINERS, process=PROCESSES)
    def resize(self, name: str, process: str) -> None:
        code = self.model.answer("ResizePty", name, process)
        self._expect(*self._with_code("ResizePty", name, process, code))

    @rule(name=CONTAINERS)
    def pids(self, name: str) -> None:
        request = task.PidsRequest(id=name)
        response = self._expect("Pids", request, task.PidsResponse, self.model.answer("Pids", name))
        if response is not None:
            rows = [row.info.value if row.info else b"" for row in response.processes]
            names = sorted(task.ProcessDetails.decode(row).exec_id for row in rows)
            assert names == self.model.pids(name)

    @rule(name=CONTAINERS)
    def stats(self, name: str) -> None:
        self._expect(*self._with_code("Stats", name, "", self.model.answer("Stats", name)))

    @rule(name=CONTAINERS)
    def checkpoint(self, name: str) -> None:
        """Into a directory, as containerd asks for it; the container goes on."""
        code = self.model.answer("Checkpoint", name)
        with tempfile.TemporaryDirectory() as directory:
            request = task.CheckpointTaskRequest(id=name, path=directory)
            self._expect("Checkpoint", request, Empty, code)
            assert bool(os.listdir(directory)) == (code == OK)

    @rule(name=CONTAINERS, shares=st.integers(2, 1024))
    def update(self, name: str, shares: int) -> None:
        resources = AnyMessage(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/LinuxResources",
            value=json.dumps({"cpu": {"shares": shares}}).encode(),
        )
        request = task.UpdateTaskRequest(id=name, resources=resources)
        self._expect("Update", request, Empty, self.model.answer("Update", name))

    @rule(name=CONTAINERS)
    def pause_and_resume(self, name: str) -> None:
        """Between the two, what needs the guest is refused and what does not is answered."""
        self._expect(
            "Resume", task.ResumeRequest(id=name), Empty, self.model.answer("Resume", name)
        )
        code = self.model.answer("Pause", name)
        if self._expect("Pause", task.PauseRequest(id=name), Empty, code) is None:
            return
        response = self._expect("State", task.StateRequest(id=name), task.StateResponse, OK)
        assert response is not None
        assert response.status == task.TaskStatus_PAUSED
        for method, request in (
            ("Pause", task.PauseRequest(id=name)),
            ("Exec", task.ExecProcessRequest(id=name, exec_id="e9")),
            ("Stats", task.StatsRequest(id=name)),
            ("Delete", task.DeleteRequest(id=name)),
            ("Update", task.UpdateTaskRequest(id=name)),
        ):
            refusal = "invalid_argument" if method == "Update" else "failed_precondition"
            self._expect(method, request, Empty, refusal)
        self._expect("Resume", task.ResumeRequest(id=name), Empty, OK)
        self.model.pause_and_resume(name)

    @rule(name=CONTAINERS)
    def connect(self, name: str) -> None:
        request = task.ConnectRequest(id=name)
        response = self._expect("Connect", request, task.ConnectResponse, OK)
        assert response is not None
        assert response.shim_pid == os.getpid()
        assert bool(response.task_pid) == (name in self.model.tasks)

    @rule(name=CONTAINERS)
    def shutdown(self, name: str) -> None:
        self.shim.idle.clear()
        self._expect("Shutdown", task.ShutdownRequest(id=name), Empty, OK)
        assert self.shim.idle.is_set() == (not self.model.tasks)

    @rule(name=CONTAINERS, process=PROCESSES)
    def wait(self, name: str, process: str) -> None:
        """Stays open until the process has ended, or was deleted."""
        found = self.model.find(name, process)
        if found is None:
            request = task.WaitRequest(id=name, exec_id=process)
            self._expect("Wait", request, task.WaitResponse, "not_found")
        elif len(self.waiters) < MOST_WAITERS:
            self.waiters.append((found, self._open_wait(name, process)))

    @rule(choice=st.integers(0, 5))
    def go_on(self, choice: int) -> None:
        """Something that is legal now and changes a state: without it few sequences get far."""
        legal = self._legal()
        legal[choice % len(legal)]()

    @rule(choice=st.integers(0, 5))
    def go_on_further(self, choice: int) -> None:
        self.go_on(choice)

    def _legal(self) -> list[Callable[[], None]]:
        if not self.model.tasks:
            return [lambda: self.create("c1", WAITS, False), lambda: self.create("c2", WAITS, True)]
        found: list[Callable[[], None]] = []
        for name, process, expected in list(self.model.living()):
            if expected.state == STOPPED:
                if not process:
                    found.append(partial(self.delete, name, process))
            elif expected.state != RUNNING:
                if self.model.answer("Start", name, process) == OK:
                    found.append(partial(self.start, name, process))
            elif process:
                found.append(partial(self.program_ends, name, process, 7))
            else:
                free = [key for key in ("e1", "e2") if not self.model.find(name, key)]
                found += [partial(self.add_exec, name, key, WAITS, False) for key in free]
                found += [partial(self.stats, name), partial(self.kill, name, "", 15, True)]
        return found

    # ---- rules: what happens to processes, guest and containerd ---------------------------------

    @rule(name=CONTAINERS, process=PROCESSES, status=EXIT_STATUSES)
    def program_ends(self, name: str, process: str, status: int) -> None:
        found = self.model.find(name, process)
        if found is None or found.state != RUNNING or found.input_ended:
            return
        self._program_of(found).say(status)
        self._ended(name, process, status)

    @rule(name=CONTAINERS)
    def vm_dies(self, name: str) -> None:
        if name not in self.model.tasks:
            return
        response = self._expect("State", task.StateRequest(id=name), task.StateResponse, OK)
        assert response is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(response.pid, signal.SIGKILL)
        self.model.lose_vm(name)
        self._settle(name)

    @precondition(lambda self: self.containerd_is_up)
    @rule()
    def stop_containerd(self) -> None:
        """Events wait from now on. None is on its way: an unanswered one would come twice."""
        wait_until(lambda: len(self.shim.containerd.topics()) >= self.model.event_count, "events")
        assert self.shim.events.flush(DEADLINE_S)
        self.shim.containerd.close()
        self.containerd_is_up = False

    @precondition(lambda self: not self.containerd_is_up)
    @rule()
    def restart_containerd(self) -> None:
        self.shim.containerd.restart()
        self.containerd_is_up = True

    # ---- rules: calls at the same time ----------------------------------------------------------

    @precondition(lambda self: not self.model.tasks)
    @rule(name=CONTAINERS, args=PROGRAMS)
    def create_twice(self, name: str, args: tuple[str, ...]) -> None:
        programs = [self._program(args, False) for _ in range(2)]
        requests = [self._create_request(name, program) for program in programs]
        answers = [
            self.pool.submit(self._ask, "Create", request, task.CreateTaskResponse)
            for request in requests
        ]
        codes = [answer.result(DEADLINE_S)[0] for answer in answers]
        assert sorted(codes) == ["already_exists", OK]
        self.model.create(name, programs[codes.index(OK)])

    @rule(
        name=CONTAINERS,
        process=PROCESSES,
        others=st.lists(
            st.sampled_from(["State", "Pids", "Connect", "ResizePty"]), min_size=1, max_size=3
        ),
    )
    def ask_while_it_starts(self, name: str, process: str, others: list[str]) -> None:
        found = self.model.find(name, process)
        asked = [self.pool.submit(self._ask, m, *self._request(m, name, process)) for m in others]
        self.start(name, process)
        for method, answer in zip(others, asked, strict=True):
            expected = OK if found or method == "Connect" else "not_found"
            if method == "Pids" and name in self.model.tasks:
                expected = OK
            assert answer.result(DEADLINE_S)[0] == expected

    @rule(
        name=CONTAINERS,
        process=PROCESSES,
        others=st.lists(
            st.sampled_from(["State", "Pids", "Stats", "Kill", "Start", "CloseIO"]),
            min_size=1,
            max_size=3,
        ),
    )
    def ask_while_it_ends(self, name: str, process: str, others: list[str]) -> None:
        """Each call finds the process still running, or ended."""
        found = self.model.find(name, process)
        if found is None or found.state != RUNNING or found.input_ended:
            return
        self._program_of(found).say(5)
        asked = [self.pool.submit(self._ask, m, *self._request(m, name, process)) for m in others]
        may_be = {5, 137} if "Kill" in others else {5}
        if "CloseIO" in others:
            found.input_ended = True
        for method, answer in zip(others, asked, strict=True):
            code = answer.result(DEADLINE_S)[0]
            # not_found: the guest has gone between question and answer.
            allowed = {
                "Stats": {OK, "failed_precondition", "not_found"},
                "Kill": {OK, "not_found"},
            }
            assert code in allowed.get(
                method, {"failed_precondition"} if method == "Start" else {OK}
            ), f"{method} while it ends answers {code}"
        response = self._wait(name, process)
        assert response.exit_status in may_be
        self._ended(name, process, response.exit_status)

    # ---- after every rule -----------------------------------------------------------------------

    @invariant()
    def states_are_the_models(self) -> None:
        if not hasattr(self, "model"):
            return
        for name, process, expected in self.model.living():
            request = task.StateRequest(id=name, exec_id=process)
            response = self._expect("State", request, task.StateResponse, OK)
            # Not one of the calls that were asked for.
            ContractMachine.calls_made -= 1
            assert response is not None
            assert response.status == STATUS[expected.state], f"{name} {process}: {expected}"
            assert response.exit_status == expected.exit_status
            assert (response.id, response.exec_id) == (name, process)
            assert bool(response.exited_at) == (expected.state == STOPPED)
        self._collect_waiters(lambda process: process.state == STOPPED)

    # ---- parts of rules -------------------------------------------------------------------------

    def _with_code(
        self, method: str, name: str, process: str, code: str
    ) -> tuple[str, Message, type[Message], str]:
        request, answer = self._request(method, name, process)
        return method, request, answer, code

    def _program_of(self, process: Expected) -> Program:
        assert isinstance(process.program, Program)
        return process.program

    def _started(self, name: str, process: str, found: Expected) -> None:
        self.model.start(name, process)
        if self._program_of(found).args is SHORT:
            self._ended(name, process, 3)
        elif found.input_ended:
            self._end_of_input(name, process, found)

    def _end_of_input(self, name: str, process: str, found: Expected) -> None:
        # A terminal's input has no end.
        program = self._program_of(found)
        if found.state == RUNNING and not program.terminal and program.stdin:
            self._ended(name, process, 9)

    def _ended(self, name: str, process: str, status: int) -> None:
        self.model.end(name, process, status)
        # One that was killed meanwhile may not have got to say a word.
        self._settle(name, whole=None if status == KILLED else process)

    def _kill(self, name: str, process: str, number: int, *, everyone: bool) -> None:
        code = self.model.answer("Kill", name, process)
        found = self.model.find(name, process)
        if found is not None and number > LAST_SIGNAL:
            code = "invalid_argument"
        request = task.KillRequest(id=name, exec_id=process, signal=number, all=everyone)
        self._expect("Kill", request, Empty, code)
        if code != OK or found is None or number in HARMLESS:
            return
        if everyone and found.state == RUNNING:
            self.model.end_all(name, number)
        else:
            self.model.end(name, process, 128 + number)
        self._settle(name)

    def _delete(self, name: str, process: str) -> None:
        code = self.model.answer("Delete", name, process)
        doomed = list(self.model.tasks[name].processes.values()) if name in self.model.tasks else []
        request = task.DeleteRequest(id=name, exec_id=process)
        response = self._expect("Delete", request, task.DeleteResponse, code)
        if response is None:
            return
        found = self.model.find(name, process)
        status = self.model.delete(name, process)
        assert response.exit_status == status
        for process_of_it in doomed if not process else [found]:
            assert process_of_it is not None
            if process_of_it.state != STOPPED:
                process_of_it.state, process_of_it.exit_status = STOPPED, 137
        self._collect_waiters(lambda waited: waited.state == STOPPED)

    def _settle(self, name: str, whole: str | None = None) -> None:
        """Waits for what the model says has ended; `whole`: who ended by itself."""
        for process, found in self.model.tasks[name].processes.items():
            if found.state == STOPPED:
                response = self._wait(name, process)
                assert response.exit_status == found.exit_status, f"{name} {process}: {found}"
                self._program_of(found).check_output(whole=process == whole)

    def _wait(self, name: str, process: str) -> task.WaitResponse:
        request = task.WaitRequest(id=name, exec_id=process)
        response = self._expect("Wait", request, task.WaitResponse, OK)
        assert response is not None
        return response

    def _open_wait(self, name: str, process: str) -> Future[tuple[str, task.WaitResponse | None]]:
        request = task.WaitRequest(id=name, exec_id=process)
        return self.waiting.submit(self._ask, "Wait", request, task.WaitResponse, WAIT_DEADLINE_S)

    def _collect_waiters(self, has_ended: Callable[[Expected], bool]) -> None:
        ended = [row for row in self.waiters if has_ended(row[0])]
        self.waiters = [row for row in self.waiters if not has_ended(row[0])]
        for expected, answer in ended:
            code, response = answer.result(DEADLINE_S)
            if response is not None:
                assert response.exit_status == expected.exit_status
            else:
                # A Delete may have overtaken it on the way.
                assert code == "not_found"
                assert all(expected is not row for _, _, row in self.model.living())


@pytest.mark.timeout(60 + CALLS)
def test_any_order_of_calls() -> None:
    """No hang (every call has a deadline), no leak, and the model's answers."""
    while ContractMachine.calls_made < CALLS:
        before = ContractMachine.calls_made
        run_state_machine_as_test(
            ContractMachine,
            settings=settings(
                max_examples=max(5, min(50, (CALLS - before) // STEPS)),
                stateful_step_count=STEPS,
                deadline=None,
                # Making a found sequence shorter takes minutes, for 30 steps that can be read.
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        assert ContractMachine.calls_made > before
