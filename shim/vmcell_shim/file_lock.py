"""flock(2) with a deadline: who holds it, lives; the kernel takes it from the dead.

A lock belongs to the open file, so it also lasts as long as a process that inherited or was sent
the descriptor. Locked files get renamed and removed: `names` tells if a path is still that file.
"""

from __future__ import annotations

import fcntl
import os
import time

from vmcell_protos.errors import HostError

_PAUSE_S = 0.01


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Takes the lock if nobody is in the way."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(fd: int, *, timeout_s: float, shared: bool = False) -> None:
    """Takes the lock, or raises HostError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not try_lock(fd, shared=shared):
        if time.monotonic() >= deadline:
            path = os.readlink(f"/proc/self/fd/{fd}")
            raise HostError(
                f"another process has held the lock on {path} for {timeout_s:g} s; "
                "see which one with lslocks",
                code="deadline_exceeded",
            )
        # flock has no deadline of its own, and a signal would be the whole process's.
        time.sleep(_PAUSE_S)


def names(path: str, fd: int) -> bool:
    """`path` is the file behind `fd`, not another one that took its place."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def create_locked(path: str, *, timeout_s: float) -> int | None:
    """A new, empty file at `path`, locked by the descriptor returned; the caller closes it.

    None when there was one: its maker has been waited for, or has died and the rest is removed now;
    either way, look again. What a dead maker's child still writes goes to the removed file.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        created = True
    except FileExistsError:
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        created = False
    try:
        lock(fd, timeout_s=timeout_s)
        # One that takes a file for left over may come between its creation and its lock.
        there = names(path, fd)
        if created and there:
            return fd
        if there:
            os.unlink(path)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


class Locked:
    """An exclusive lock on the file at `path`, made when missing, for the length of a block."""

    def __init__(self, path: str, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def __enter__(self) -> None:
        try:
            lock(self._fd, timeout_s=self._timeout_s)
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
