"""Writing to a child's standard input (or its terminal) without ever waiting for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from vmcell_protos.errors import CallerError

from .loop import WRITABLE, Loop

# All input that waits for one process, whoever sent it.
MAX_WAITING_BYTES = 64 * 1024 * 1024
_PIECE_BYTES = 64 * 1024

Done = Callable[[CallerError | None], None]


def _write_error(text: str) -> CallerError:
    return CallerError(f"error writing to stdin: {text}", code="internal")


class StdinWriter:
    """Owns the non-blocking descriptor; writes what it is given in order, then tells each giver.

    A write whose client left stays in line: half an input would be worse than a late one.
    """

    def __init__(self, loop: Loop, descriptor: int) -> None:
        self._loop = loop
        self._descriptor = descriptor
        self._queue: deque[tuple[memoryview, Done]] = deque()
        self._closing = False
        self.closed = False
        self.waiting_bytes = 0

    def write(self, data: bytes, done: Done) -> None:
        """`done(None)` once the child's pipe has taken all of it, else `done(error)`."""
        if self.closed or self._closing:
            done(_write_error("stdin is closed"))
            return
        if self.waiting_bytes + len(data) > MAX_WAITING_BYTES:
            done(
                CallerError(
                    f"error writing to stdin: more than {MAX_WAITING_BYTES} bytes wait already",
                    code="resource_exhausted",
                )
            )
            return
        self._queue.append((memoryview(data), done))
        self.waiting_bytes += len(data)
        if len(self._queue) == 1:
            self._drain()
            if self._queue:
                self._loop.watch(self._descriptor, WRITABLE, self._on_event)

    def close_when_written(self) -> None:
        """End of input for the child, after what was given before."""
        self._closing = True
        if not self._queue:
            self.close()

    def close(self) -> None:
        """At once; whoever still waits gets an error."""
        if self.closed:
            return
        self.closed = True
        self._loop.forget(self._descriptor)
        os.close(self._descriptor)
        waiting, self._queue = self._queue, deque()
        self.waiting_bytes = 0
        for _, done in waiting:
            done(_write_error("the process does not read its input any more"))

    def _on_event(self, mask: int) -> None:
        self._drain()
        if not self._queue and not self.closed:
            self._loop.forget(self._descriptor)
            if self._closing:
                self.close()

    def _drain(self) -> None:
        while self._queue and not self.closed:
            data, done = self._queue[0]
            try:
                written = os.write(self._descriptor, data[:_PIECE_BYTES]) if data else 0
            except BlockingIOError:
                return
            except OSError:
                # EPIPE, or EIO of a terminal: nobody will read again.
                self.close()
                return
            self.waiting_bytes -= written
            if written < len(data):
                self._queue[0] = (data[written:], done)
                continue
            self._queue.popleft()
            done(None)
