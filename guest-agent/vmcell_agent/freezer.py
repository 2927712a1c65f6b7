"""A container that stands still, and goes on: cgroup.freeze, and the news that it is done.

    THAWED --freeze--> FREEZING --cgroup.events: frozen 1--> FROZEN
    FROZEN --thaw----> THAWING  --cgroup.events: frozen 0--> THAWED
    FREEZING --deadline--> THAWED, and an error

A call the other way ends the wait of the one before with an error.
"""

from __future__ import annotations

from vmcell_agent.cgroupwatch import EventsFile
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.cgroup import Cgroup
    from vmcell_agent.eventloop import Loop, Timer

    Answer = Callable[[VmcellError | None], None]

# A process stops where it would return to user space; one in a long disk access comes late.
FREEZE_SECONDS = 10.0
MAX_WAITERS = 64


class Freezer:
    """The freezer of one container; `frozen` is what was asked for last."""

    def __init__(self, loop: Loop, cgroup: Cgroup, name: str) -> None:
        """`name` is for errors."""
        self.frozen = False
        self._loop = loop
        self._cgroup = cgroup
        self.name = name
        self._waiters: list[Answer] = []
        self._file: EventsFile | None = None
        self._timer: Timer | None = None

    def set(self, frozen: bool, answer: Answer) -> None:
        """Freeze or thaw; answers when it is so. Raises CallerError or HostError."""
        if len(self._waiters) >= MAX_WAITERS:
            raise CallerError(
                f"{self.name} has {MAX_WAITERS} waiters for the freezer already",
                code="resource_exhausted",
            )
        if frozen != self.frozen:
            self._cgroup.freeze(frozen)
            self.frozen = frozen
            other = "frozen" if frozen else "thawed"
            self._end_waiting(CallerError(f"{self.name} was {other} meanwhile", code="aborted"))
        if self._file is None:
            path = f"{self._cgroup.path}/cgroup.events"
            self._file = EventsFile(self._loop, path, self._look)
            self._timer = self._loop.call_later(FREEZE_SECONDS, self._deadline)
        self._waiters.append(answer)
        self._look()

    def _look(self) -> None:
        try:
            stands_still = self._cgroup.stands_still
        except HostError as error:
            self._end_waiting(error)
            return
        if stands_still == self.frozen:
            self._end_waiting(None)

    def _deadline(self) -> None:
        verb = "freeze" if self.frozen else "thaw"
        error = HostError(
            f"{self.name} did not {verb} within {FREEZE_SECONDS:.0f} s", code="deadline_exceeded"
        )
        if self.frozen:
            self.frozen = False
            try:
                self._cgroup.freeze(False)
            except HostError as second:
                error = HostError(f"{error}; {second}", code="deadline_exceeded")
        self._end_waiting(error)

    def _end_waiting(self, result: VmcellError | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._file is not None:
            self._file.close()
            self._file = None
        waiters, self._waiters = self._waiters, []
        for answer in waiters:
            answer(result)

    def close(self) -> None:
        """Who still waits gets not_found. Idempotent."""
        self._end_waiting(CallerError(f"{self.name} was removed", code="not_found"))
