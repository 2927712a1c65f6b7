"""The control connection: ttrpc bytes in, calls to the service, answers out, nothing blocking.

While the host does not read its answers, its requests are not read either, so what waits here is
bounded by the calls already taken.
"""

from __future__ import annotations

import socket

from vmcell_agent.eventloop import READABLE, WRITABLE
from vmcell_protos.errors import VmcellError
from vmcell_protos.ttrpc import ProtocolError, ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop
    from vmcell_protos.ttrpc import Call
    from vmcell_protos.wire import Message

    Dispatch = Callable[[str, str, bytes, Callable[[Message | VmcellError], None]], None]

MAX_CALLS = 1024
_READ_BYTES = 256 << 10
_MAX_UNSENT_BYTES = 4 << 20


class ControlConnection:
    """Owns the socket; `lost` is called once, when the host is gone or breaks the protocol."""

    def __init__(
        self, loop: Loop, connection: socket.socket, dispatch: Dispatch, lost: Callable[[str], None]
    ) -> None:
        """`lost` gets the reason as a sentence."""
        connection.setblocking(False)
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
            self._lose(f"the control connection broke: {error}")
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
            self._lose(f"the control connection broke: {error}")
            return
        self._watch()

    def _lose(self, reason: str) -> None:
        lost, self._lost = self._lost, None
        if lost is not None:
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()
            lost(reason)
