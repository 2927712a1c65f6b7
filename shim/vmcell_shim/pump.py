"""Bytes from one descriptor to another until the end, without copying them through Python.

One thread a stream. splice(2) moves pages between a pipe and a socket; where neither end is a pipe
(a log file) bytes are read and written. Nothing polls: the thread sleeps until the source has
something, the sink takes something, or it is told what has changed.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK_BYTES = 1 << 20
_COPY_BYTES = 64 << 10
_SOURCE_ENDED = (errno.ECONNRESET, errno.ENOTCONN)


class Pump:
    """One direction of one stream. Does not own `source` and `sink`; `on_end` closes what has to
    be closed and runs in the pump's thread, exactly once."""

    def __init__(
        self,
        source: int,
        sink: int,
        *,
        splice: bool,
        on_end: Callable[[], None],
        name: str,
        drain: Callable[[str], None] | None = None,
    ) -> None:
        """`drain`: a sink that fails is no end. It is told why, and the source is read on, so that
        whoever writes there neither dies nor stands still."""
        self._source = source
        self._sink = sink
        self._splice = splice
        self._on_end = on_end
        self._drain = drain
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._stopped = False
        self._silent_s: float | None = None
        self._pending = b""
        self._sink_failed = False
        self._told_errno: int | None = None
        self._sink_is_full = False
        self._moved_bytes = 0
        self.moved = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the pump at once; what is still in the source is not moved. Idempotent."""
        self._stopped = True
        self._wake_up()

    def finish(self, silent_s: float) -> None:
        """The program behind the source has ended: a source that is silent for that long has too
        (another process may hold it for ever). Idempotent."""
        if self._silent_s is None:
            self._silent_s = silent_s
            self._wake_up()

    def wait_end(self, timeout_s: float) -> bool:
        """True once the pump has ended and `on_end` has run."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wait_moved(self, *, full_s: float, deadline: float) -> bool:
        """Waits until all is moved (`moved` is set, by `on_end` when that has more to do); False
        when the sink takes nothing for `full_s`, or at the deadline (time.monotonic())."""
        while True:
            seen = self._moved_bytes
            if self.moved.wait(max(0.0, min(full_s, deadline - time.monotonic()))):
                return True
            stuck = self._sink_is_full and self._moved_bytes == seen
            if stuck or time.monotonic() >= deadline:
                return False

    def _wake_up(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            while (self._pending or self._wait(self._source, select.POLLIN)) and self._move():
                pass
        finally:
            self._on_end()
            self.moved.set()
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def _wait(self, fd: int, events: int) -> bool:
        """False when stop() was called, or when the source is silent and that is its end."""
        poll = select.poll()
        poll.register(fd, events)
        poll.register(self._wake, select.POLLIN)
        while not self._stopped:
            silent_s = self._silent_s if fd == self._source else None
            ready = {found for found, _ in poll.poll(None if silent_s is None else silent_s * 1000)}
            if not ready:
                return False
            if self._wake in ready:
                os.eventfd_read(self._wake)
            elif fd in ready:
                return True
        return False

    def _move(self) -> bool:
        """Moves what is there; False at the end of the source or when the sink has gone."""
        try:
            if self._sink_failed:
                return self._account(len(self._read()))
            return self._splice_some() if self._splice else self._copy_some()
        except BlockingIOError:
            self._sink_is_full = True
            try:
                return self._wait(self._sink, select.POLLOUT)
            finally:
                self._sink_is_full = False

    def _splice_some(self) -> bool:
        flags = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
        try:
            return self._account(os.splice(self._source, self._sink, _CHUNK_BYTES, flags=flags))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _SOURCE_ENDED:
                return False
            self._sink_failed = True
            return self._lose_sink(error)

    def _copy_some(self) -> bool:
        if not self._pending:
            self._pending = self._read()
            if not self._pending:
                return False
        try:
            written = os.write(self._sink, self._pending)
        except BlockingIOError:
            raise
        except OSError as error:
            # Not for good: a full disk may have room again for what comes later.
            self._pending = b""
            return self._lose_sink(error)
        self._pending = self._pending[written:]
        return self._account(written)

    def _account(self, count: int) -> bool:
        self._moved_bytes += count
        return count > 0

    def _lose_sink(self, error: OSError) -> bool:
        """Whether the pump goes on, dropping what cannot be written."""
        if self._drain is None:
            if error.errno != errno.EPIPE:
                raise error
            return False
        if error.errno != self._told_errno:
            self._told_errno = error.errno
            self._drain(f"output is lost: {error}")
        return True

    def _read(self) -> bytes:
        """What the source has; b"" at its end. Raises BlockingIOError."""
        try:
            return os.read(self._source, _COPY_BYTES)
        except OSError as error:
            if error.errno not in _SOURCE_ENDED:
                raise
            return b""
