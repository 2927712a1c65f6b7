"""The control connection: ttrpc bytes in, calls to the service, answers out, nothing blocking.

While the host does not read its answers, its requests are not read either, so what waits here is
bounded by the calls already taken.

    SERVING --reset by the device-----------------> DIALLING --the host answers--> SERVING
    SERVING --end of file, any other error--------> LOST
    DIALLING --nobody has answered in time--------> LOST

A reset is what a restored guest sees first: its connections led to a host that is not there. In
vsock it is ENOTCONN for whoever reads or writes, with ECONNRESET kept as the socket's error
(virtio_vsock_reset_sock, vsock_connectible_recvmsg); a host that only closes is an end of file.
"""

from __future__ import annotations

import errno
import os
import socket

from vmcell_agent.eventloop import READABLE, WRITABLE
from vmcell_protos.errors import VmcellError
from vmcell_protos.ttrpc import ProtocolError, ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop, Timer
    from vmcell_protos.ttrpc import Call
    from vmcell_protos.wire import Message

    Dispatch = Callable[[str, str, bytes, Callable[[Message | VmcellError], None]], None]

MAX_CALLS = 1024
_RESET = frozenset((errno.ECONNRESET, errno.ENOTCONN))
_READ_BYTES = 256 << 10
_MAX_UNSENT_BYTES = 4 << 20
DIAL_SECONDS = 15.0
DIAL_AGAIN_SECONDS = 0.02


class ControlConnection:
    """Owns the socket; `lost` is called once, when the host is gone or breaks the protocol."""

    def __init__(
        self, loop: Loop, connection: socket.socket, dispatch: Dispatch, lost: Callable[[str], None]
    ) -> None:
        """`lost` gets the reason as a sentence."""
        connection.setblocking(False)
        self.was_reset = False  # whether that is how it was lost
        self._loop = loop
        self._connection = connection
        self._dispatch = dispatch
        self._lost: Callable[[str], None] | None = lost
        self._protocol = ServerConnection()
        self._unsent = bytearray()
        self._open_calls = 0
        self._watch()

    def close(self) -> None:
        """Send what can be sent at once, then close; idempotent."""
        if self._connection.fileno() < 0:
            return
        self._lost = None
        self._send()
        if self._connection.fileno() >= 0:
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()

    def _watch(self) -> None:
        events = WRITABLE if self._unsent else 0
        if len(self._unsent) < _MAX_UNSENT_BYTES:
            events |= READABLE
        self._loop.watch(self._connection.fileno(), events, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & WRITABLE:
            self._send()
        if events & ~WRITABLE and self._connection.fileno() >= 0:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(error)
            return
        if not data:
            self._lose("the host closed the control connection")
            return
        try:
            calls, errors = self._protocol.receive(data)
        except ProtocolError as error:
            self._lose(f"the host broke the control protocol: {error}")
            return
        self._unsent += errors
        for call in calls:
            self._serve(call)
        self._send()

    def _serve(self, call: Call) -> None:
        if self._open_calls >= MAX_CALLS:
            text = f"{MAX_CALLS} calls are open already"
            self._unsent += self._protocol.fail(call.stream_id, "resource_exhausted", text)
            return
        self._open_calls += 1

        def answer(result: Message | VmcellError) -> None:
            self._open_calls -= 1
            if self._connection.fileno() < 0:  # whoever asked is gone
                return
            if isinstance(result, VmcellError):
                self._unsent += self._protocol.fail(call.stream_id, result.code, str(result))
            else:
                self._unsent += self._protocol.respond(call.stream_id, result.encode())
            self._send()

        self._dispatch(call.service, call.method, call.payload, answer)

    def _send(self) -> None:
        if self._connection.fileno() < 0:
            return
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)
            return
        self._watch()

    def _break(self, error: OSError) -> None:
        kept = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.was_reset = error.errno in _RESET or kept in _RESET
        self._lose(f"the control connection broke: {error}")

    def _lose(self, reason: str) -> None:
        lost, self._lost = self._lost, None
        if lost is not None:
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()
            lost(reason)


class Redial:
    """Dials until the host answers; `close` is idempotent and ends it without a word."""

    def __init__(
        self,
        loop: Loop,
        dial: Callable[[], socket.socket],
        connected: Callable[[socket.socket], None],
        failed: Callable[[str], None],
    ) -> None:
        """`dial` gives a non-blocking socket that is being connected, or raises OSError;
        `connected` gets one that is, or `failed` a sentence after DIAL_SECONDS."""
        self._loop = loop
        self._dial = dial
        self._connected = connected
        self._failed = failed
        self._socket: socket.socket | None = None
        self._reason = "it does not answer"
        self._deadline: Timer = loop.call_later(DIAL_SECONDS, self._give_up)
        self._again: Timer = loop.call_later(0, self._begin)

    def _begin(self) -> None:
        try:
            self._socket = self._dial()
        except OSError as error:
            self._try_later(error)
            return
        self._loop.watch(self._socket.fileno(), WRITABLE, self._on_ready)

    def _on_ready(self, events: int) -> None:
        assert self._socket is not None
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if number:
                raise OSError(number, os.strerror(number))
            self._socket.getpeername()
        except OSError as error:
            self._drop()
            self._try_later(error)
            return
        connection, self._socket = self._socket, None
        self._loop.unwatch(connection.fileno())
        self.close()
        self._connected(connection)

    def _try_later(self, error: OSError) -> None:
        self._reason = str(error)
        self._again = self._loop.call_later(DIAL_AGAIN_SECONDS, self._begin)

    def _give_up(self) -> None:
        self.close()
        self._failed(f"no host answers within {DIAL_SECONDS:g} s: {self._reason}")

    def _drop(self) -> None:
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self._deadline.cancel()
        self._again.cancel()
        self._drop()


class HostConnection:
    """The control connection to the host, whoever that is; owns it and the dialling. `close` is
    idempotent."""

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        dial: Callable[[], socket.socket],
        dispatch: Dispatch,
        *,
        reset: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        """`dial`: see Redial. `reset` is called when the host is to be another one from here on,
        `lost` with a sentence when there is none any more."""
        self._loop = loop
        self._dial = dial
        self._dispatch = dispatch
        self._reset = reset
        self._lost = lost
        self._open: ControlConnection | Redial
        self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        self._control = ControlConnection(self._loop, connection, self._dispatch, self._on_lost)
        self._open = self._control

    def _on_lost(self, reason: str) -> None:
        if not self._control.was_reset:
            self._lost(reason)
            return
        self._reset()
        self._open = Redial(self._loop, self._dial, self._serve, self._lost)

    def close(self) -> None:
        self._open.close()
