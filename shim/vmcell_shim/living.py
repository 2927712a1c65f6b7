"""Processes named by pid and start time: alive, killed, gone.

A pid alone may have been given to another process since; the start time (field 22 of
/proc/PID/stat, clock ticks since boot, proc(5)) tells them apart, and a pidfd keeps them apart.
"""

from __future__ import annotations

import os
import select
import signal
from typing import NamedTuple


class Living(NamedTuple):
    """One process of the past or present."""

    pid: int
    start_ticks: int


def start_ticks(pid: int) -> int | None:
    """When `pid` started, or None when no such process exists (a zombie counts as gone)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and brackets; fields are counted behind its last bracket.
    after = text[text.rindex(b")") + 2 :].split()
    return None if after[0] in (b"Z", b"X") else int(after[19])


def identify(pid: int) -> Living:
    """The process behind `pid` as it is now; raises ProcessLookupError when it has ended."""
    ticks = start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return Living(pid, ticks)


def kill_and_wait(process: Living, timeout_s: float) -> bool:
    """SIGKILL, then wait until it is gone with all its threads; True when it is (or was before)."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        ticks = start_ticks(process.pid)
        if ticks is not None:
            if ticks != process.start_ticks:
                return True
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # Also one that was killed before: threads behind a first one that has ended hold its files.
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(int(timeout_s * 1000)))
    finally:
        os.close(pidfd)
