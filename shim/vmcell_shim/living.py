"""Processes named by pid and start time: alive, killed, gone.

A pid alone may have been given to another process since; the start time (field 22 of
/proc/PID/stat, clock ticks since boot, proc(5)) tells them apart, and a pidfd keeps them apart.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Living(NamedTuple):
    """One process of the past or present."""

    pid: int
    start_ticks: int


def start_ticks(pid: int) -> int | None:
    """When `pid` started, or None when no such process exists (a zombie counts as gone)."""
    state, ticks = _stat(pid)
    return None if state in ("Z", "X") else ticks


def _stat(pid: int) -> tuple[str, int | None]:
    """State and start time; a process whose first thread alone has ended is "Z" too."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return "X", None
    # The command name may hold spaces and brackets; fields are counted behind its last bracket.
    after = text[text.rindex(b")") + 2 :].split()
    return after[0].decode(), int(after[19])


def identify(pid: int) -> Living:
    """The process behind `pid` as it is now; raises ProcessLookupError when it has ended."""
    ticks = start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return Living(pid, ticks)


def kill_all(processes: Iterable[Living], timeout_s: float) -> list[Living]:
    """SIGKILL for each, then one wait for all; those that are not gone when it is over."""
    waiting: dict[int, Living] = {}
    poll = select.poll()
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            pidfd = _kill(process)
            if pidfd is not None:
                waiting[pidfd] = process
                poll.register(pidfd, select.POLLIN)
        while waiting:
            ready = poll.poll(max(0, int((deadline - time.monotonic()) * 1000)))
            for pidfd, _ in ready:
                poll.unregister(pidfd)
                del waiting[pidfd]
                os.close(pidfd)
            if not ready:
                break
        return list(waiting.values())
    finally:
        for pidfd in waiting:
            os.close(pidfd)


def _kill(process: Living) -> int | None:
    """Its pidfd, SIGKILL sent; None when it has been gone before. The pidfd tells when the last of
    its threads has ended, which the state of the first one does not."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a number says whose process is just being reaped
            raise
        return None
    try:
        if _stat(process.pid)[1] == process.start_ticks:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return pidfd
    except ProcessLookupError:
        pass  # it ended by itself just now
    except BaseException:
        os.close(pidfd)
        raise
    os.close(pidfd)
    return None
