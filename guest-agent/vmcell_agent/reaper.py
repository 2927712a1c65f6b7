"""Waits for every child the kernel hands to PID 1, and tells who asked for it.

SIGCHLD writes a byte to a pipe (signal.set_wakeup_fd); the loop then collects all that have ended.
Children nobody asked for are orphans and only collected.
"""

from __future__ import annotations

import os
import signal

from vmcell_agent.eventloop import READABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from vmcell_agent.eventloop import Loop

# Nobody stops PID 1 by a signal; SIGPIPE and SIGXFSZ would only repeat what the call says.
IGNORED_SIGNALS = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGPIPE,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXFSZ,
)


class Reaper:
    """One in a process; `close` gives the pipe back."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._ended: dict[int, Callable[[int], None]] = {}
        self._wake, self._signal_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, _let_wakeup_fd_tell)
        signal.set_wakeup_fd(self._signal_end, warn_on_full_buffer=False)
        loop.watch(self._wake, READABLE, self._on_signal)

    def expect(self, pid: int, ended: Callable[[int], None]) -> None:
        """Call `ended` with waitpid's status when the child `pid` has ended."""
        self._ended[pid] = ended

    def close(self) -> None:
        if self._wake >= 0:
            signal.set_wakeup_fd(-1)
            self._loop.unwatch(self._wake)
            os.close(self._wake)
            os.close(self._signal_end)
            self._wake = -1

    def _on_signal(self, events: int) -> None:
        os.read(self._wake, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ended = self._ended.pop(pid, None)
            if ended is not None:
                ended(status)


def _let_wakeup_fd_tell(number: int, frame: FrameType | None) -> None:
    """A handler must exist for set_wakeup_fd to write."""
