"""What containerd may expect of a shim: states, answers and events of tasks, without any shim.

Written from the contract (reference: shim-contract 2.2, 3.4, 1.7; containerd pkg/process
init_state.go and exec_state.go), not from vmcell's own table, which it is to check. To add a call:
a row in ANSWERS, and where it changes something, a method of ContractModel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vmcell_protos import events as event_messages
from vmcell_protos import task
from vmcell_protos.wire import Message

CREATED, RUNNING, STOPPED = "created", "running", "stopped"
OK = "ok"
KILLED = 137
NOT_STARTED = 127

STATUS = {
    CREATED: task.TaskStatus_CREATED,
    RUNNING: task.TaskStatus_RUNNING,
    STOPPED: task.TaskStatus_STOPPED,
}

# call → state of the process it names → OK or the error's code. What does not exist is not_found.
ANSWERS: dict[str, dict[str, str]] = {
    "Start": {CREATED: OK, RUNNING: "failed_precondition", STOPPED: "failed_precondition"},
    "Kill": {CREATED: OK, RUNNING: OK, STOPPED: "not_found"},
    "Delete": {CREATED: OK, RUNNING: "failed_precondition", STOPPED: OK},
    # Of the container's init, when an exec is added:
    "Exec": {CREATED: OK, RUNNING: OK, STOPPED: "failed_precondition"},
    "Stats": {CREATED: "failed_precondition", RUNNING: OK, STOPPED: "failed_precondition"},
    **{
        call: {CREATED: OK, RUNNING: OK, STOPPED: OK}
        for call in ("State", "Wait", "Pids", "CloseIO", "ResizePty", "Connect")
    },
    "Pause": {CREATED: "failed_precondition", RUNNING: OK, STOPPED: "failed_precondition"},
    # Of a container that is not paused; how a paused one answers is the machine's own rule.
    "Resume": dict.fromkeys((CREATED, RUNNING, STOPPED), "failed_precondition"),
    "Update": {CREATED: OK, RUNNING: OK, STOPPED: "failed_precondition"},
    "Checkpoint": {CREATED: "failed_precondition", RUNNING: OK, STOPPED: "failed_precondition"},
}
# These answer the same whether the task exists or not.
ALWAYS = {
    "Connect": OK,
}
# Signals whose default action is none (signal(7)), and the null signal.
HARMLESS = (0, 17, 18, 23, 28)
LAST_SIGNAL = 64

Event = tuple[str, str, str]
"""(topic, container, process; "" is the init)."""


@dataclass
class ModelProcess:
    """One process: `program` is the machine's own word for what it runs."""

    program: object
    state: str = CREATED
    exit_status: int = 0
    failed: bool = False
    input_ended: bool = False


@dataclass
class ModelTask:
    """One container; its processes by exec id, "" is the init."""

    processes: dict[str, ModelProcess] = field(default_factory=dict)


class ContractModel:
    """All tasks of a shim, and the events so far.

    `events` holds groups: between groups the order is fixed, within one it is not (processes that
    die together).
    """

    def __init__(self) -> None:
        self.tasks: dict[str, ModelTask] = {}
        self.events: list[Counter[Event]] = []

    def find(self, container: str, process: str = "") -> ModelProcess | None:
        found = self.tasks.get(container)
        return found.processes.get(process) if found else None

    def answer(self, call: str, container: str, process: str = "") -> str:
        """OK, or the code of the error that `call` gets now."""
        if call in ALWAYS:
            return ALWAYS[call]
        found = self.find(container, process)
        if found is None:
            return "not_found"
        if call == "Start" and process and self._process(container, "").state == CREATED:
            # runc's shim runs it; a guest has nothing to run it in yet (docs/limits.md).
            return "failed_precondition"
        return ANSWERS[call][found.state]

    # ---- what calls do --------------------------------------------------------------------------

    def answer_create(self, container: str) -> str:
        """Containers without a pod have a microVM, and so a shim, of their own."""
        if container in self.tasks:
            return "already_exists"
        return "failed_precondition" if self.tasks else OK

    def create(self, container: str, program: object) -> None:
        self.tasks[container] = ModelTask({"": ModelProcess(program)})
        self._happens(("create", container, ""))

    def answer_exec(self, container: str, process: str) -> str:
        answer = self.answer("Exec", container)
        if answer == OK and self.find(container, process):
            return "already_exists"
        return answer

    def add_exec(self, container: str, process: str, program: object) -> None:
        self.tasks[container].processes[process] = ModelProcess(program)
        self._happens(("exec-added", container, process))

    def start(self, container: str, process: str) -> None:
        self._process(container, process).state = RUNNING
        self._happens(("exec-started" if process else "start", container, process))

    def start_failed(self, container: str, process: str) -> None:
        """An init has ended by it, an exec stays as it is."""
        if process:
            self._process(container, process).failed = True
        else:
            self.end(container, "", NOT_STARTED)

    def end(self, container: str, process: str, status: int) -> None:
        """The process ends, running or not; an init takes the whole container with it."""
        found = self._process(container, process)
        found.state, found.exit_status = STOPPED, status
        others = [] if process else self._unended_execs(container)
        for _, other in others:
            other.state, other.exit_status = STOPPED, KILLED
        names = [process, *(name for name, _ in others)]
        self._happens(*(("exit", container, name) for name in names))

    def end_all(self, container: str, signal: int) -> None:
        """A deadly signal was sent to every process of the container."""
        ended = []
        for name, process in self.tasks[container].processes.items():
            if process.state != STOPPED:
                # What has never been started got no signal; it ends with the VM.
                status = 128 + signal if process.state == RUNNING or not name else KILLED
                process.state, process.exit_status = STOPPED, status
                ended.append(("exit", container, name))
        self._happens(*ended)

    def lose_vm(self, container: str) -> None:
        """The microVM dies under its processes."""
        names = [
            name
            for name, process in self.tasks[container].processes.items()
            if process.state != STOPPED
        ]
        for name in names:
            process = self._process(container, name)
            process.state, process.exit_status = STOPPED, KILLED
        if names:
            self._happens(*(("exit", container, name) for name in names))

    def delete(self, container: str, process: str) -> int:
        """The exit status that Delete answers."""
        found = self._process(container, process)
        status = found.exit_status if found.state == STOPPED else KILLED
        if process:
            del self.tasks[container].processes[process]
            return status
        names = [name for name, _ in self._unended_execs(container)]
        if names:
            self._happens(*(("exit", container, name) for name in names))
        self._happens(("delete", container, ""))
        del self.tasks[container]
        return status

    def pause_and_resume(self, container: str) -> None:
        self._happens(("paused", container, ""))
        self._happens(("resumed", container, ""))

    def pids(self, container: str) -> list[str]:
        """Processes that Pids lists: the init always, an exec until it has ended."""
        processes = self.tasks[container].processes
        return sorted(
            name for name, process in processes.items() if not name or process.state != STOPPED
        )

    def living(self) -> Iterator[tuple[str, str, ModelProcess]]:
        for container, found in self.tasks.items():
            for name, process in found.processes.items():
                yield container, name, process

    # ---- events ---------------------------------------------------------------------------------

    @property
    def event_count(self) -> int:
        return sum(group.total() for group in self.events)

    def check_events(self, seen: list[Event]) -> None:
        """Every event, once, in an order that the groups allow."""
        rest = list(seen)
        for number, group in enumerate(self.events):
            now, rest = rest[: group.total()], rest[group.total() :]
            assert Counter(now) == group, f"group {number}: {now} instead of {group}; all: {seen}"
        assert not rest, f"events nobody expects: {rest}"

    def _happens(self, *events: Event) -> None:
        self.events.append(Counter(events))

    def _unended_execs(self, container: str) -> list[tuple[str, ModelProcess]]:
        processes = self.tasks[container].processes.items()
        return [(name, found) for name, found in processes if name and found.state != STOPPED]

    def _process(self, container: str, process: str) -> ModelProcess:
        found = self.find(container, process)
        assert found is not None
        return found


# topic → message, and the field that names the process.
IDENTITIES: dict[str, tuple[type[Message], str]] = {
    "create": (event_messages.TaskCreate, ""),
    "start": (event_messages.TaskStart, ""),
    "exec-added": (event_messages.TaskExecAdded, "exec_id"),
    "exec-started": (event_messages.TaskExecStarted, "exec_id"),
    "paused": (event_messages.TaskPaused, ""),
    "resumed": (event_messages.TaskResumed, ""),
    "exit": (event_messages.TaskExit, "id"),
    "delete": (event_messages.TaskDelete, ""),
}


def seen_events(rows: list[tuple[str, str, bytes]]) -> list[Event]:
    """The events of `rows` (topic, type, message) as the model names them."""
    seen = []
    for topic, _, value in rows:
        name = topic.removeprefix("/tasks/")
        kind, field_name = IDENTITIES[name]
        event: Any = kind.decode(value)
        process = getattr(event, field_name) if field_name else ""
        seen.append((name, event.container_id, "" if process == event.container_id else process))
    return seen
