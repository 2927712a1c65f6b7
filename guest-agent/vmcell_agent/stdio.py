"""The standard streams of one process: host connections on one side, pipes or a terminal on the
other, a pump for each direction.

It knows when every declared stream has been dialled, maps half-close both ways, and tells when all
that an ended program wrote has been handed over.
"""

from __future__ import annotations

import os
import socket

from vmcell_agent import terminal
from vmcell_agent.pump import Pump
from vmcell_protos.errors import CallerError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop
    from vmcell_agent.streamdoor import StreamDoor
    from vmcell_protos.agent import Streams

# More than a pseudo terminal holds: 4 KiB to be read, 8 KiB and a page on the way (n_tty.c, pty.c).
_TERMINAL_HOLDS_BYTES = 32 << 10


def check(streams: Streams) -> None:
    """Raise CallerError for a set of streams that cannot be."""
    ids = [number for number in (streams.stdin, streams.stdout, streams.stderr) if number]
    if len(set(ids)) != len(ids):
        raise CallerError("streams of one process must have different ids")
    if streams.terminal and (streams.stdin or streams.stderr or not streams.stdout):
        raise CallerError("a terminal has one stream, in streams.stdout")


class StandardStreams:
    """Owns the dialled connections, the pumps and the terminal's master."""

    def __init__(
        self, loop: Loop, door: StreamDoor, streams: Streams, changed: Callable[[], None]
    ) -> None:
        """`changed` is called when a stream is dialled and whenever bytes were handed over.

        Raises CallerError when an id is in use.
        """
        self._loop = loop
        self._door = door
        self._streams = streams
        self._changed = changed
        self._connections: dict[str, socket.socket] = {}
        self._missing: dict[str, int] = {}
        self._input: Pump | None = None
        self._input_closed = False
        self._outputs: list[Pump] = []
        self._master = -1
        check(streams)
        for name in ("stdin", "stdout", "stderr"):
            stream_id = getattr(streams, name)
            if stream_id:
                self._expect(name, stream_id)

    def _expect(self, name: str, stream_id: int) -> None:
        def dialled(connection: socket.socket) -> None:
            del self._missing[name]
            self._connections[name] = connection
            self._changed()

        if not self._door.expect(stream_id, dialled):
            self.close()
            raise CallerError(f"stream id {stream_id} is in use", code="already_exists")
        self._missing[name] = stream_id

    @property
    def missing(self) -> list[str]:
        """Names of declared streams that have not been dialled."""
        return list(self._missing)

    def connect_pipes(self, stdin: int, stdout: int, stderr: int) -> None:
        """Start moving bytes; the pipe ends (-1: none) belong to the streams from here on."""
        if stdin >= 0:
            connection = self._connections.pop("stdin")
            self._input = self._pump(connection.detach(), stdin, lambda: os.close(stdin), False)
            if self._input_closed:
                self._input.finish_input()
        for name, pipe in (("stdout", stdout), ("stderr", stderr)):
            if pipe >= 0:
                connection = self._connections.pop(name)
                self._outputs.append(self._output_pump(pipe, connection))

    def connect_terminal(self, master: int) -> None:
        """Move bytes between the one stream and `master`, which belongs to the streams."""
        if "stdout" not in self._connections or not self._streams.terminal:
            raise GuestError("a terminal came from a process that was to have none")
        terminal.check_master(master)
        os.set_blocking(master, False)
        self._master = master
        connection = self._connections.pop("stdout")
        source = os.dup(connection.fileno())
        self._input = self._pump(source, master, lambda: None, False)
        # the output's end of file comes from its own descriptor of the master
        self._outputs.append(self._output_pump(os.dup(master), connection))

    def _output_pump(self, source: int, connection: socket.socket) -> Pump:
        def half_close() -> None:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError:  # the host was first
                pass
            finally:
                connection.close()

        return self._pump(source, connection.fileno(), half_close, True)

    def _pump(self, source: int, sink: int, end_sink: Callable[[], None], drain: bool) -> Pump:
        return Pump(
            self._loop, source, sink, end_sink=end_sink, progressed=self._changed, drain=drain
        )

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; nothing happens before there is one."""
        if self._master >= 0:
            terminal.set_size(self._master, rows, columns)

    def close_input(self) -> None:
        """Hand over what has arrived on standard input, then end it; before there is a process,
        once there is one."""
        self._input_closed = True
        if self._input is not None:
            self._input.finish_input()

    def program_ended(self) -> None:
        """No more input; count what the program has left to be handed over."""
        if self._input is not None:
            self._input.close()
        # Its end of file may never come: children of the program may hold a pipe or terminal open.
        for pump in self._outputs:
            if self._streams.terminal:
                pump.owe_until_empty(_TERMINAL_HOLDS_BYTES)
            else:
                pump.owe_what_is_written()

    @property
    def settled(self) -> bool:
        """Whether all that the ended program wrote has been handed over."""
        return all(pump.settled for pump in self._outputs)

    @property
    def dropped_bytes(self) -> int:
        return sum(pump.dropped_bytes for pump in self._outputs)

    def close(self) -> None:
        """Drop everything; idempotent."""
        for stream_id in self._missing.values():
            self._door.forget(stream_id)
        self._missing.clear()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        for pump in (self._input, *self._outputs):
            if pump is not None:
                pump.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
