"""A ttrpc server on a unix socket: a thread for each connection and one for each call.

Calls run side by side (Wait stays open for hours), answers go out in any order under the
connection's write lock; a peer that has gone makes an answer void, not the work. What a call
raises beside VmcellError is a bug: the caller gets `internal`, the log the traceback.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading

from vmcell_protos.errors import VmcellError
from vmcell_protos.ttrpc import ProtocolError, ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.ttrpc import Call
    from vmcell_shim.journal import Journal

    Handler = Callable[[str, str, bytes, int], bytes]

_RECEIVE_BYTES = 64 << 10
_ACCEPT_PAUSE_MS = 200
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


class TtrpcServer:
    """Owns the listening socket. `handler(service, method, payload, timeout_ns)` answers a call."""

    def __init__(self, listener: socket.socket, handler: Handler, journal: Journal) -> None:
        self._listener = listener
        self._handler = handler
        self._journal = journal
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._answered = threading.Condition()
        self._open_calls = 0

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def serve(self, tick_s: float, on_tick: Callable[[], bool]) -> None:
        """Accepts connections until stop(), or until `on_tick`, asked every `tick_s`, is False."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        wake = select.poll()
        wake.register(self._wake, select.POLLIN)
        while True:
            ready = dict(poll.poll(int(tick_s * 1000)))
            if self._wake in ready or (not ready and not on_tick()):
                return
            if self._listener.fileno() in ready:
                try:
                    self._accept()
                except OSError as error:
                    # Out of descriptors or memory: the task goes on, and the peer waits in line.
                    self._journal.error(f"cannot take a connection yet: {error}")
                    wake.poll(_ACCEPT_PAUSE_MS)

    def stop(self) -> None:
        """Makes serve() return. Idempotent, from any thread."""
        os.eventfd_write(self._wake, 1)

    def close(self, timeout_s: float = 0.0) -> None:
        """Cuts every connection once all calls are answered, or after `timeout_s`. After serve()
        has returned."""
        with self._answered:
            self._answered.wait_for(lambda: not self._open_calls, timeout_s)
        with self._lock:
            for connection in self._connections:
                _shut(connection)
        self._listener.close()
        os.close(self._wake)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _ = _PEER.unpack(credentials)
        if uid not in (0, os.geteuid()):
            self._journal.warning(f"process {pid} of uid {uid} may not connect")
            connection.close()
            return
        with self._lock:
            self._connections.add(connection)
        threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        protocol = ServerConnection()
        sending = threading.Lock()
        try:
            while data := _receive(connection):
                calls, answers = protocol.receive(data)
                _send(connection, sending, answers)
                for call in calls:
                    with self._answered:
                        self._open_calls += 1
                    arguments = (connection, sending, protocol, call)
                    threading.Thread(target=self._answer, args=arguments, daemon=True).start()
        except ProtocolError as error:
            self._journal.warning(f"connection closed: {error}")
        finally:
            with self._lock:
                self._connections.discard(connection)
            with sending:
                connection.close()

    def _answer(
        self,
        connection: socket.socket,
        sending: threading.Lock,
        protocol: ServerConnection,
        call: Call,
    ) -> None:
        text = f"{call.method}: the shim has a bug; its log has the traceback"
        answer = protocol.fail(call.stream_id, "internal", text)
        try:
            payload = self._handler(call.service, call.method, call.payload, call.timeout_ns)
            answer = protocol.respond(call.stream_id, payload)
        except VmcellError as error:
            answer = protocol.fail(call.stream_id, error.code, str(error))
        finally:
            _send(connection, sending, answer)
            with self._answered:
                self._open_calls -= 1
                self._answered.notify_all()


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_RECEIVE_BYTES)
    except OSError:
        return b""


def _send(connection: socket.socket, sending: threading.Lock, data: bytes) -> None:
    if not data:
        return
    with sending:
        try:
            connection.sendall(data)
        except OSError:
            # The peer has gone; it will ask again after it reconnects.
            _shut(connection)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # Closed by its own thread meanwhile.
        return
