"""One process of a container as containerd sees it: state, streams, exit.

The init and every exec are the same here. All state changes go through the lifecycle's table under
one short lock; nobody waits while holding it.
"""

from __future__ import annotations

import threading
import time

from vmcell_protos.errors import HostError
from vmcell_shim.lifecycle import CREATED, CREATING, DELETED, STARTING, STOPPED, next_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.agent import AddProcessRequest
    from vmcell_shim.stdio import Stdio

SIGKILL = 9
KILLED_STATUS = 128 + SIGKILL


class Process:
    """`exec_id` "" is the container's init. `stdio` is owned and closed by the container."""

    def __init__(self, container_id: str, exec_id: str, stdio: Stdio) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdio = stdio
        self.state = CREATING
        self.exit_status = 0
        self.exited_at_ns = 0
        self.size: tuple[int, int] | None = None
        # How the guest is to learn of an exec; None once it knows.
        self.unsent: AddProcessRequest | None = None
        self._condition = threading.Condition()

    @property
    def id(self) -> str:
        """What TaskExit calls it: the exec's id, or the container's for its init."""
        return self.exec_id or self.container_id

    @property
    def name(self) -> str:
        """What an error sentence calls it."""
        kind = "exec" if self.exec_id else "task"
        return f"{kind} {self.id}"

    def advance(self, operation: str) -> str:
        """Applies `operation` and returns the state before it; raises CallerError."""
        with self._condition:
            before = self.state
            self.state = next_state(before, operation, self.name)
            if before == CREATED and self.state == DELETED:
                # Never started; whoever waits for it reads what a killed one leaves.
                self.exit_status, self.exited_at_ns = KILLED_STATUS, time.time_ns()
            self._condition.notify_all()
            return before

    def advance_unless_ended(self, operation: str) -> bool:
        """Applies `operation` to a process that may have ended meanwhile; False then. Raises
        CallerError."""
        with self._condition:
            if self.state in (STOPPED, DELETED):
                return False
            self.advance(operation)
            return True

    def finish(self, exit_status: int, announce: Callable[[], None]) -> bool:
        """The process has ended; False when that was known already.

        `announce` runs before anybody who waits is told, and so before a delete: it may not wait.
        """
        with self._condition:
            if self.state in (STOPPED, DELETED):
                return False
            self.state = next_state(self.state, "exit", self.name)
            self.exit_status = exit_status
            self.exited_at_ns = time.time_ns()
            announce()
            self._condition.notify_all()
            return True

    def wait_settled(self, timeout_s: float) -> None:
        """Waits while the process is being started. Raises HostError(deadline_exceeded)."""
        with self._condition:
            if not self._condition.wait_for(lambda: self.state != STARTING, timeout_s):
                raise HostError(
                    f"{self.name} is still being started after {timeout_s:g} s",
                    code="deadline_exceeded",
                )

    def wait_ended(self, timeout_s: float | None) -> bool:
        """True once the exit status stands."""
        with self._condition:
            return self._condition.wait_for(lambda: self.state in (STOPPED, DELETED), timeout_s)
