"""Two stream sockets joined both ways, each direction with an end of its own.

One thread a pair. For connections where neither end is a pipe, so splice(2) has nothing to offer;
a direction holds at most one chunk, so a slow reader slows the writer down and costs no memory.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress

_CHUNK_BYTES = 64 << 10
# One side has said its last and the other says nothing: it has hung up without a word, or is a
# guest that means to hold the connection for ever.
_HALF_OPEN_S = 300.0
_ENDED = select.POLLHUP | select.POLLERR


class _Direction:
    """Bytes from `source` to `sink`. `finished`: nothing will go this way any more."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.waiting = b""
        self.finished = False

    def read(self) -> None:
        """Takes a chunk, and hands the end of the source on to the sink; a reset is an end."""
        try:
            self.waiting = self.source.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.waiting = b""
        if not self.waiting:
            self.finish()
            with suppress(OSError):  # it may be gone as well
                self.sink.shutdown(socket.SHUT_WR)

    def write(self) -> None:
        """Hands on what the sink takes; one that has gone ends this direction, not the other."""
        try:
            self.waiting = self.waiting[self.sink.send(self.waiting) :]
        except BlockingIOError:
            return
        except OSError:
            self.finish()

    def finish(self) -> None:
        self.waiting = b""
        self.finished = True


def relay(left: socket.socket, right: socket.socket, stop: int) -> None:
    """Moves bytes both ways until both directions have ended or the descriptor `stop` becomes
    readable. The sockets stay the caller's and become non-blocking."""
    for sock in (left, right):
        sock.setblocking(False)
    directions = (_Direction(left, right), _Direction(right, left))
    moved_at = time.monotonic()
    while not all(direction.finished for direction in directions):
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        for fd, events in _wanted(directions).items():
            poll.register(fd, events)
        half_open = any(direction.finished for direction in directions)
        left_s = moved_at + _HALF_OPEN_S - time.monotonic()
        ready = dict(poll.poll(max(0.0, left_s * 1000) if half_open else None))
        if not ready or stop in ready:
            return
        _move(directions, ready)
        moved_at = time.monotonic()


def _wanted(directions: tuple[_Direction, ...]) -> dict[int, int]:
    """poll(2) events by descriptor; one that nothing is wanted of is left out, for its end would
    be told again and again."""
    wanted: dict[int, int] = {}
    for direction in directions:
        if direction.finished:
            continue
        end = direction.sink if direction.waiting else direction.source
        event = select.POLLOUT if direction.waiting else select.POLLIN
        wanted[end.fileno()] = wanted.get(end.fileno(), 0) | event
    return wanted


def _move(directions: tuple[_Direction, ...], ready: dict[int, int]) -> None:
    for direction in directions:
        if direction.finished:
            continue
        into = ready.get(direction.sink.fileno(), 0)
        outof = ready.get(direction.source.fileno(), 0)
        if into & _ENDED:
            # Nobody reads there any more; what comes from there is still moved.
            direction.finish()
        elif direction.waiting and into & select.POLLOUT:
            direction.write()
        elif not direction.waiting and outof & (select.POLLIN | _ENDED):
            direction.read()
