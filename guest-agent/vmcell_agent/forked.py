"""What every forked child does first: it stops being a copy of the agent.

The signal handlers, the wake-up pipe and the descriptors of PID 1 are none of the child's; what it
needs it names. The caller has just forked and never returns into the agent's loop.
"""

from __future__ import annotations

import os
import signal

_LAST_SIGNAL = 64
_OPEN_FILES_END = 1 << 20


def reset() -> None:
    """Default signals, none blocked, an own session, the usual umask."""
    signal.set_wakeup_fd(-1)
    for number in range(1, _LAST_SIGNAL + 1):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):  # 32, 33: glibc's own
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    os.setsid()


def close_all_but(*kept: int) -> None:
    low = 0
    for fd in sorted(kept):
        if low < fd:  # closerange(0, 0) would close everything
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, _OPEN_FILES_END)
