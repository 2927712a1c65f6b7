"""VMMs that are ready before anybody asks, of the sizes asked for last: the zygote's part.

    asked for a size, then nothing more for 50 ms --> forked --"ready"--> handed over, or dropped

A spare that ends is forgotten with its size, until that is asked for again. Each has one socket to
the zygote: "ready" comes out of it, the request of the one it is for goes in, and its end of file
ends a spare that waits. So none outlives the zygote, or its renewal.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime.size import Size, size_from_words, size_words

# How many spares of each size the zygote keeps; 0: none.
COUNT_VARIABLE = "VMCELL_SPARES"
DEFAULT_COUNT, MAX_COUNT = 1, 16
# From one zygote to the one it becomes by its renewal.
SIZES_VARIABLE = "VMCELL_SPARE_SIZES"
MAX_SIZES = 2
# A fork and a spare's own work are kept out of the way of requests that come in a burst.
QUIET_S = 0.05
READY = b"ready"
SPARE_NAME = "vmcell-spare"  # of a process that has said so

Fork = Callable[[Size, socket.socket], bool]
"""Forks a spare that has this socket; False when that failed and was said."""


class _Kept(NamedTuple):
    size: Size
    control: socket.socket


class Spares:
    """On the zygote's loop, which calls `hear` for what `poll` says of `descriptors`."""

    def __init__(self, fork: Fork, poll: select.poll, count: int, sizes: list[Size]) -> None:
        """`sizes`, the last asked for at the end, are wanted from the beginning."""
        self._fork = fork
        self._poll = poll
        self._count = count
        self._sizes = sizes[-MAX_SIZES:]
        self._kept: dict[int, _Kept] = {}
        self._ready: set[int] = set()
        self._quiet_until = time.monotonic() + QUIET_S

    @property
    def descriptors(self) -> list[int]:
        """Of those that are kept."""
        return list(self._kept)

    @property
    def sizes(self) -> list[Size]:
        """The sizes asked for last, for a zygote that comes after this one."""
        return self._sizes

    def busy(self) -> None:
        """The zygote had something else to do."""
        self._quiet_until = time.monotonic() + QUIET_S

    def take(self, size: Size) -> socket.socket | None:
        """The socket of a spare of this size, the caller's now and still polled, if one is ready;
        from now on there are to be some."""
        if not self._count:
            return None
        if size in self._sizes:
            self._sizes.remove(size)
        self._sizes.append(size)
        for old in self._sizes[:-MAX_SIZES]:
            self._sizes.remove(old)
            self._drop([fd for fd, kept in self._kept.items() if kept.size == old])
        for fd in self._ready:
            kept = self._kept[fd]
            if kept.size == size:
                self._ready.discard(fd)
                del self._kept[fd]
                return kept.control
        return None

    def wait_s(self) -> float | None:
        """How long until one is to be forked; None when there are enough."""
        if self._missing() is None:
            return None
        return max(0.0, self._quiet_until - time.monotonic())

    def fill(self) -> None:
        """Forks one if it is time. Returns in the zygote only."""
        size = self._missing()
        if size is None or time.monotonic() < self._quiet_until:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            forked = self._fork(size, theirs)
        if not forked:
            ours.close()
            self._sizes.remove(size)
            return
        ours.setblocking(False)
        self._kept[ours.fileno()] = _Kept(size, ours)
        self._poll.register(ours, select.POLLIN)

    def hear(self, fd: int) -> None:
        """One of `descriptors` is ready to be read: it is ready, or gone."""
        kept = self._kept[fd]
        try:
            message = kept.control.recv(len(READY))
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if message == READY:
            self._ready.add(fd)
            return
        self._drop([fd])
        if kept.size in self._sizes:  # not again and again what fails
            self._sizes.remove(kept.size)

    def drop(self) -> None:
        """Ends all of them."""
        self._drop(self.descriptors)

    def keep_none(self) -> None:
        """There is somebody else to do that."""
        self._count = 0

    def forget(self) -> None:
        """In a child: they are the zygote's, and the descriptors somebody else's soon."""
        for kept in self._kept.values():
            kept.control.detach()
        self._kept.clear()
        self._ready.clear()

    def _drop(self, fds: list[int]) -> None:
        for fd in fds:
            self._ready.discard(fd)
            self._poll.unregister(fd)
            self._kept.pop(fd).control.close()

    def _missing(self) -> Size | None:
        """The size asked for last that lacks a spare."""
        for size in reversed(self._sizes):
            if sum(kept.size == size for kept in self._kept.values()) < self._count:
                return size
        return None


def wanted_count(text: str | None) -> int:
    """What COUNT_VARIABLE says; CallerError."""
    if text is None:
        return DEFAULT_COUNT
    if not text.isascii() or not text.isdigit() or len(text) > 3 or int(text) > MAX_COUNT:
        raise CallerError(f"{COUNT_VARIABLE} is {text!r}; give 0 to {MAX_COUNT}")
    return int(text)


def sizes_text(sizes: list[Size]) -> str:
    """For SIZES_VARIABLE."""
    return ";".join(",".join(word.decode() for word in size_words(size)) for size in sizes)


def sizes_from_text(text: str) -> list[Size]:
    """The opposite; CallerError."""
    rows = (row.encode(errors="replace").split(b",") for row in text.split(";") if row)
    return [size_from_words(row) for row in rows]


def count_and_sizes() -> tuple[int, list[Size]]:
    """As this process's environment says, which is rid of the sizes then. CallerError."""
    sizes = sizes_from_text(os.environ.pop(SIZES_VARIABLE, ""))
    return wanted_count(os.environ.get(COUNT_VARIABLE)), sizes
