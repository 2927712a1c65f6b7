"""Child processes of the service, each the leader of a session of its own.

A child that was killed may leave processes of its group behind: gunicorn's workers, nginx's. The
group's number stays taken as long as the leader is not waited for, so they are told of it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from vmcell_protos.errors import HostError

POLL_S = 0.02
OPEN_FILES = 32768
# linux/prctl.h
PR_SET_PDEATHSIG = 1


class Child:
    """A process that is ours to wait for; not thread-safe."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._status: int | None = None

    def status(self) -> int | None:
        """Its exit status (the negative signal for a killed one), None while it runs.

        Does not take the process off the table: `reap` does.
        """
        if self._status is None:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                is_exit = found.si_code == os.CLD_EXITED
                self._status = found.si_status if is_exit else -found.si_status
        return self._status

    def signal(self, number: int) -> None:
        """Signals the process; an ended one is fine."""
        if self.status() is None:
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Signals what is left of its group; only before `reap`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        deadline = time.monotonic() + timeout_s
        while self.status() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def reap(self) -> None:
        """Takes an ended process off the table; its numbers may be another's afterwards."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _end_with_parent() -> None:
    """SIGTERM when the service is killed: its next start would find ports and locks taken."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prepare() -> None:
    """Each stream takes nginx two descriptors, and the usual soft limit is 1024."""
    _end_with_parent()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def fork(name: str, run_child: Callable[[], int]) -> Child:
    """A child that runs a function of ours; the caller has no threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(name, pid)
    status = 70
    try:
        os.setsid()
        _end_with_parent()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        status = run_child()
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001  # told here; nothing of the parent may go on
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def execute(name: str, command: list[str]) -> Child:
    """A child that is another program; raises HostError when it is not there."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_prepare,  # the service has no threads
        )
    except OSError as error:
        raise HostError(f"cannot start {name}: {command[0]}: {error.strerror}") from error
    process.returncode = 0  # waited for here, not by Popen
    return Child(name, process.pid)
