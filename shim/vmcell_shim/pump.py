"""Bytes from one descriptor to another until the end, without copying them through Python.

One thread a stream. splice(2) moves pages between a pipe and a socket; where neither end is a pipe
(a log file) bytes are read and written. Nothing polls: the thread sleeps until the source has
something, the sink takes something, or stop() is called.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time

_CHUNK_BYTES = 1 << 20
_COPY_BYTES = 64 << 10
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


class Pump:
    """One direction of one stream. Does not own `source` and `sink`; `on_end` closes what has to
    be closed and runs in the pump's thread, exactly once."""

    def __init__(
        self, source: int, sink: int, *, splice: bool, on_end: Callable[[], None], name: str
    ) -> None:
        self._source = source
        self._sink = sink
        self._splice = splice
        self._on_end = on_end
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._pending = b""
        self.moved_bytes = 0
        self.sink_is_full = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the pump at once; what is still in the source is not moved. Idempotent."""
        with self._lock:
            if self._stop >= 0:
                os.eventfd_write(self._stop, 1)

    def wait_end(self, timeout_s: float) -> bool:
        """True once the pump has ended and `on_end` has run."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wait_quiet(self, *, silent_s: float, full_s: float) -> None:
        """Waits for the end as long as something moves: a source that is silent for `silent_s`, or
        a sink that takes nothing for `full_s`, is given up and the pump stopped."""
        seen, since = -1, time.monotonic()
        while not self.wait_end(0.05):
            now = time.monotonic()
            if self.moved_bytes != seen:
                seen, since = self.moved_bytes, now
            elif now - since > (full_s if self.sink_is_full else silent_s):
                self.stop()
                self.wait_end(1.0)
                return

    def _run(self) -> None:
        try:
            while self._wait(self._source, select.POLLIN) and self._move():
                pass
        finally:
            self._on_end()
            with self._lock:
                os.close(self._stop)
                self._stop = -1

    def _wait(self, fd: int, events: int) -> bool:
        """False when stop() was called."""
        poll = select.poll()
        poll.register(fd, events)
        poll.register(self._stop, select.POLLIN)
        return all(ready != self._stop for ready, _ in poll.poll())

    def _move(self) -> bool:
        """Moves what is there; False at the end of the source or when the sink has gone."""
        try:
            count = self._move_some()
        except BlockingIOError:
            self.sink_is_full = True
            try:
                return self._wait(self._sink, select.POLLOUT)
            finally:
                self.sink_is_full = False
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        self.moved_bytes += count
        return count > 0

    def _move_some(self) -> int:
        if self._splice:
            flags = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
            return os.splice(self._source, self._sink, _CHUNK_BYTES, flags=flags)
        if not self._pending:
            self._pending = os.read(self._source, _COPY_BYTES)
            if not self._pending:
                return 0
        written = os.write(self._sink, self._pending)
        self._pending = self._pending[written:]
        return written


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
