"""For programs that tests start: they end with whoever started them, whatever becomes of that."""

from __future__ import annotations

import os
import select
import threading


def end_with_parent() -> None:
    """From here on this process ends when its parent does. PR_SET_PDEATHSIG is no help: it means
    the thread that forked, which may end at once."""
    pidfd = os.pidfd_open(os.getppid())

    def watch() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
