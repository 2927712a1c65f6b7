"""Who waits for the OOM killer to have been at work in a container.

The kernel counts a kill before it sends the signal (mm/oom_kill.c, __oom_kill_process), so what is
read after a process has been reaped includes the kill that ended it.
"""

from __future__ import annotations

from contextlib import suppress

from vmcell_agent.cgroupwatch import EventsFile
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.cgroup import Cgroup
    from vmcell_agent.eventloop import Loop

    Answer = Callable[[int | VmcellError], None]

MAX_WAITERS = 64


class OomWatch:
    """The waiters of one container; memory.events is followed from the first of them on."""

    def __init__(self, loop: Loop, cgroup: Cgroup, name: str) -> None:
        """`name` is for errors."""
        self._loop = loop
        self._cgroup = cgroup
        self.name = name
        self._kills = 0
        self._file: EventsFile | None = None
        self._waiters: list[tuple[int, Answer]] = []

    @property
    def kills(self) -> int:
        """The count by now; the last one known when the cgroup is gone."""
        with suppress(HostError):  # removed
            self._kills = max(self._kills, self._cgroup.oom_kills)
        return self._kills

    def wait(self, seen: int, answer: Answer) -> None:
        """Answers with the count once it is above `seen`; raises CallerError."""
        if len(self._waiters) >= MAX_WAITERS:
            raise CallerError(
                f"{self.name} has {MAX_WAITERS} waiters for the OOM killer already",
                code="resource_exhausted",
            )
        if self._file is None:
            path = f"{self._cgroup.path}/memory.events"
            self._file = EventsFile(self._loop, path, self._tell)
        self._waiters.append((seen, answer))
        self._tell()

    def _tell(self) -> None:
        kills = self.kills
        ready = [answer for seen, answer in self._waiters if kills > seen]
        self._waiters = [row for row in self._waiters if kills <= row[0]]
        for answer in ready:
            answer(kills)

    def forget_waiters(self) -> None:
        """Nobody is there any more to be answered."""
        self._waiters.clear()

    def close(self) -> None:
        """Who still waits gets not_found. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
        waiters, self._waiters = self._waiters, []
        for _, answer in waiters:
            answer(CallerError(f"{self.name} was removed", code="not_found"))
