"""The standard streams of one process: host connections on one side, pipes or a terminal on the
other, a pump for each direction.

It knows when every declared stream has been dialled, maps half-close both ways, and tells when all
that an ended program wrote has been handed over. It can be parked, and go on with other connections
than before.
"""

from __future__ import annotations

import os
import socket

from vmcell_agent import terminal
from vmcell_agent.pump import ENDED, Pump
from vmcell_protos.errors import CallerError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop
    from vmcell_agent.streamdoor import StreamDoor
    from vmcell_protos.agent import Streams

# More than a pseudo terminal holds: 4 KiB to be read, 8 KiB and a page on the way (n_tty.c, pty.c).
_TERMINAL_HOLDS_BYTES = 32 << 10
_NAMES = ("stdin", "stdout", "stderr")


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
        self._outputs: dict[str, Pump] = {}
        self._master = -1
        self.parked = False
        self._adopted = False
        check(streams)
        self._expect(streams, changed)

    def _expect(self, streams: Streams, told: Callable[[], None]) -> None:
        """Raises CallerError when an id is in use; then none is expected."""
        for name in _NAMES:
            stream_id = getattr(streams, name)
            if not stream_id:
                continue

            def dialled(connection: socket.socket, name: str = name) -> None:
                del self._missing[name]
                self._connections[name] = connection
                told()

            if not self._door.expect(stream_id, dialled):
                self._drop_connections()
                raise CallerError(f"stream id {stream_id} is in use", code="already_exists")
            self._missing[name] = stream_id

    def forget_host(self) -> None:
        """The host that was to dial is another one now: nobody uses the ids that are expected."""
        for name, stream_id in self._missing.items():
            self._door.forget(stream_id)
            self._missing[name] = 0  # never dialled, and no id of anybody's

    def _drop_connections(self) -> None:
        """What is expected and what was dialled for a pump that there is not yet."""
        for stream_id in self._missing.values():
            self._door.forget(stream_id)
        self._missing.clear()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

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
                self._outputs[name] = self._output_pump(pipe, connection)

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
        self._outputs["stdout"] = self._output_pump(os.dup(master), connection)

    def _output_pump(self, source: int, connection: socket.socket) -> Pump:
        return self._pump(source, connection.fileno(), _half_close(connection), True)

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
        for pump in self._outputs.values():
            if self._streams.terminal:
                pump.owe_until_empty(_TERMINAL_HOLDS_BYTES)
            else:
                pump.owe_what_is_written()

    @property
    def settled(self) -> bool:
        """Whether all that the ended program wrote has been handed over."""
        return all(pump.settled for pump in self._outputs.values())

    @property
    def dropped_bytes(self) -> int:
        return sum(pump.dropped_bytes for pump in self._outputs.values())

    # -- standing still, and going on

    def park(self) -> None:
        """Move nothing until `go_on`; idempotent."""
        self.parked = True
        for pump in self._pumps():
            pump.park()

    def adopt(self, streams: Streams, dialled: Callable[[], None]) -> None:
        """While parked: from `go_on` on these are the streams, and there are no others. `dialled`
        is called for each. Raises CallerError for such as cannot be."""
        check(streams)
        if streams.stdout and streams.terminal != self._streams.terminal:
            has = "has a terminal" if self._streams.terminal else "has no terminal"
            raise CallerError(f"the process {has}, and its streams cannot become others")
        self._drop_connections()
        self._expect(streams, dialled)
        self._adopted = True

    def go_on(self) -> None:
        """Move again: by the connections there were, or by the adopted ones alone. Idempotent."""
        self.parked = False
        if self._adopted:
            self._adopted = False
            self._replace_connections()
        for pump in self._pumps():
            pump.go_on()

    def _replace_connections(self) -> None:
        connections, self._connections = self._connections, {}
        source = connections.get("stdout" if self._streams.terminal else "stdin")
        self._replace_input(source)
        for name, pump in self._outputs.items():
            connection = connections.get(name)
            if connection is None:
                pump.give_up_sink()
            elif pump.state != ENDED:
                pump.replace_sink(connection.fileno(), _half_close(connections.pop(name)))
        for connection in connections.values():  # taken by a copy, or for nothing that there is
            connection.close()

    def _replace_input(self, connection: socket.socket | None) -> None:
        if connection is None:
            if self._input is not None:
                self._input.close()
        elif self._input is not None and self._input.state != ENDED:
            self._input.replace_source(os.dup(connection.fileno()))
        elif self._master >= 0:  # the host before had ended its half; a terminal takes another
            source = os.dup(connection.fileno())
            self._input = self._pump(source, self._master, lambda: None, False)

    def _pumps(self) -> list[Pump]:
        return [*([self._input] if self._input is not None else ()), *self._outputs.values()]

    def close(self) -> None:
        """Drop everything; idempotent."""
        self._drop_connections()
        for pump in self._pumps():
            pump.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


def _half_close(connection: socket.socket) -> Callable[[], None]:
    """What ends an output: the connection's writing half, then the connection."""

    def end() -> None:
        try:
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # the host was first
            pass
        finally:
            connection.close()

    return end
