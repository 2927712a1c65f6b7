"""Moves bytes from one descriptor to another until the end, one direction, with back-pressure.

A pump holds at most one chunk. While the sink does not take it, the source is not read, so a stuck
reader stops the program that writes and nothing else. When the sink is gone, output is read on and
dropped (a program must not die of a reader that left), input is not.

    MOVING    --end of source, all handed over-->  ENDED
    MOVING    --sink gone, output--------------->  DRAINING
    MOVING    --sink gone, input---------------->  ENDED
    DRAINING  --end of source------------------->  ENDED
    DRAINING  --another sink-------------------->  MOVING

Beside that a pump may be parked: it looks at neither descriptor, so an end that breaks meanwhile is
not noticed and what is pending stays pending. While it is parked its ends may be replaced.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios

from vmcell_agent.eventloop import READABLE, WRITABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop

CHUNK_BYTES = 64 << 10
MOVING, DRAINING, ENDED = "moving", "draining", "ended"


class Pump:
    """Owns `source` and closes it; `end_sink` is called once, when nothing more will be written."""

    def __init__(
        self,
        loop: Loop,
        source: int,
        sink: int,
        *,
        end_sink: Callable[[], None],
        progressed: Callable[[], None],
        drain: bool,
    ) -> None:
        """Both descriptors are non-blocking. `drain`: read on after the sink is gone."""
        self.state = MOVING
        self.dropped_bytes = 0
        self._loop = loop
        self._source = source
        self._sink = sink
        self._end_sink: Callable[[], None] | None = end_sink
        self._progressed = progressed
        self._drain = drain
        self._pending = memoryview(b"")
        self._ending = False
        self._owed_bytes: int | None = None
        self._until_empty = False
        self._parked = False
        loop.watch(source, READABLE, self._on_source)

    def park(self) -> None:
        """Move nothing until `go_on`; idempotent."""
        if self.state != ENDED:
            self._parked = True
            self._loop.unwatch(self._source)
            self._loop.unwatch(self._sink)

    def go_on(self) -> None:
        """Move again what is pending, then what comes; idempotent."""
        if self.state == ENDED or not self._parked:
            return
        self._parked = False
        if self._pending:
            self._on_sink(0)
            return
        self._loop.watch(self._source, READABLE, self._on_source)
        if self._ending or self._until_empty:
            self._loop.call_later(0, self._read_to_end)

    def replace_source(self, source: int) -> None:
        """Read from `source` from now on, which is closed with the pump as the old one is now. The
        pump is parked and has not ended."""
        os.close(self._source)
        self._source = source

    def replace_sink(self, sink: int, end_sink: Callable[[], None]) -> None:
        """Write to `sink` from now on, what is pending first; the old one is ended. The pump is
        parked and has not ended."""
        self._finish_sink()
        self._sink, self._end_sink = sink, end_sink
        self.state = MOVING

    def give_up_sink(self) -> None:
        """Nobody is there to take anything: as if writing had failed."""
        if self.state == MOVING:
            self._parked = False
            self._lose_sink()
        else:
            self.go_on()

    def finish_input(self) -> None:
        """Hand over what can be read now, then treat the source as ended."""
        self._ending = True
        self._read_to_end()

    def owe_what_is_written(self) -> None:
        """The program has ended: note how many of its bytes are still to be handed over."""
        if self.state == ENDED:
            return
        queued = struct.unpack("=i", fcntl.ioctl(self._source, termios.FIONREAD, bytes(4)))[0]
        self._owed_bytes = queued + len(self._pending)

    def owe_until_empty(self, most_bytes: int) -> None:
        """The same for a terminal, which cannot tell how much it holds: all is handed over once a
        read finds nothing (n_tty_read waits for what is under way inside), or `most_bytes` are."""
        if self.state == ENDED:
            return
        self._owed_bytes = most_bytes + len(self._pending)
        self._until_empty = True
        self._loop.call_later(0, self._read_to_end)

    @property
    def settled(self) -> bool:
        """Whether all that was owed has been handed over (or nobody is there to take it)."""
        return self.state != MOVING or (self._owed_bytes is not None and self._owed_bytes <= 0)

    def close(self) -> None:
        """Stop, dropping what is pending; idempotent."""
        if self.state == ENDED:
            return
        self.state = ENDED
        self._pending = memoryview(b"")
        self._loop.unwatch(self._source)
        os.close(self._source)
        self._finish_sink()

    def _finish_sink(self) -> None:
        end_sink, self._end_sink = self._end_sink, None
        if end_sink is not None:
            self._loop.unwatch(self._sink)
            end_sink()

    def _on_source(self, events: int) -> None:
        try:
            data = os.read(self._source, CHUNK_BYTES)
        except BlockingIOError:
            if self._ending:
                self._end()
            elif self._until_empty:
                self._until_empty = False
                self._owed_bytes = 0
                self._progressed()
            return
        except OSError:  # EIO: no slave of the terminal is open; ECONNRESET: the host is gone
            data = b""
        if not data:
            self._end()
        elif self.state == DRAINING:
            self.dropped_bytes += len(data)
            self._account(len(data))
        else:
            self._pending = memoryview(data)
            self._on_sink(0)

    def _read_to_end(self) -> None:
        if self.state == MOVING and not self._pending and not self._parked:
            self._on_source(0)

    def _on_sink(self, events: int) -> None:
        before = len(self._pending)
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._sink, self._pending) :]
        except BlockingIOError:
            self._loop.unwatch(self._source)
            self._loop.watch(self._sink, WRITABLE, self._on_sink)
            self._account(before - len(self._pending))
            return
        except OSError:  # EPIPE, ECONNRESET and whatever else a gone peer makes of it
            self._lose_sink()
            return
        self._loop.unwatch(self._sink)
        self._loop.watch(self._source, READABLE, self._on_source)
        self._account(before)
        if self._ending or self._until_empty:  # nothing more may come that would wake the loop
            self._loop.call_later(0, self._read_to_end)

    def _lose_sink(self) -> None:
        self.dropped_bytes += len(self._pending)
        self._pending = memoryview(b"")
        if not self._drain:
            self._end()
            return
        self.state = DRAINING
        self._finish_sink()
        self._loop.watch(self._source, READABLE, self._on_source)
        self._progressed()

    def _account(self, count: int) -> None:
        if self._owed_bytes is not None:
            self._owed_bytes -= count
            self._until_empty = self._until_empty and self._owed_bytes > 0
        if count:
            self._progressed()

    def _end(self) -> None:
        self.close()
        self._progressed()
