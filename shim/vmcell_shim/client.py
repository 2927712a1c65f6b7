"""A ttrpc client over one stream socket: many threads call, one thread reads the answers.

Used for containerd's event service and for the guest's agent. The guest is hostile: its frames are
capped by the codec, and what breaks the framing or answers no call ends the connection.
"""

from __future__ import annotations

import socket
import struct
import threading

from vmcell_protos.errors import HostError
from vmcell_protos.ttrpc import MAX_DATA_BYTES, ClientConnection, ProtocolError
from vmcell_protos.wire import MAX_ITEMS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from vmcell_protos.ttrpc import Reply
    from vmcell_protos.wire import Message

    M = TypeVar("M", bound=Message)

_RECEIVE_BYTES = 64 << 10
_SEND_TIMEOUT = struct.pack("ll", 10, 0)  # struct timeval


class _Slot:
    """Where one call waits for its reply."""

    __slots__ = ("arrived", "reply")

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.reply: Reply | None = None


class ConnectionLost(HostError):
    """The peer is gone or has been given up; no call can be made any more."""


class TtrpcClient:
    """Owns `sock` until close(). `on_lost` runs once, in the reader's thread, when the connection
    ends for whatever reason. Longer answers than `max_data_bytes`, or of more items, are errors."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        on_lost: Callable[[], None] | None = None,
        *,
        max_data_bytes: int = MAX_DATA_BYTES,
        max_items: int = MAX_ITEMS,
    ) -> None:
        # A peer that reads nothing must not hold up a call, and with it every other call, for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        self._sock = sock
        self._peer = peer
        self._on_lost = on_lost
        self._max_items = max_items
        self._connection = ClientConnection(max_data_bytes=max_data_bytes, max_items=max_items)
        self._lock = threading.Lock()
        self._slots: dict[int, _Slot] = {}
        self._lost = False
        self._reader = threading.Thread(target=self._read, name=f"ttrpc-{peer}", daemon=True)
        self._reader.start()

    def call(
        self,
        service: str,
        method: str,
        request: Message,
        answer: type[M],
        timeout_s: float | None,
    ) -> M:
        """The answer. Raises VmcellError as the peer said it, WireError for an answer that is no
        `answer`, ConnectionLost, or HostError(deadline_exceeded) after `timeout_s` (None: wait for
        ever)."""
        slot = _Slot()
        timeout_ns = 0 if timeout_s is None else int(timeout_s * 1e9)
        # The lock is held while sending, so that ids rise on the wire too.
        with self._lock:
            if self._lost:
                raise self._lost_error(method)
            stream_id, data = self._connection.call(service, method, request.encode(), timeout_ns)
            self._slots[stream_id] = slot
            try:
                self._sock.sendall(data)
            except OSError:
                # The reader sees the same end; a peer that does not read is given up as well.
                self._shut()
        arrived = slot.arrived.wait(timeout_s)
        with self._lock:
            self._slots.pop(stream_id, None)
        if not arrived:
            raise HostError(
                f"{self._peer} has not answered {method} within {timeout_s:g} s",
                code="deadline_exceeded",
            )
        if slot.reply is None:
            raise self._lost_error(method)
        if slot.reply.error is not None:
            raise slot.reply.error
        return answer.decode(slot.reply.payload, self._max_items)

    @property
    def lost(self) -> bool:
        return self._lost

    def close(self) -> None:
        """Every waiting call ends with ConnectionLost. Idempotent; not from the reader's thread."""
        self._shut()
        self._reader.join()
        self._sock.close()

    def _lost_error(self, method: str) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self._peer} ended during {method}")

    def _shut(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Not connected any more, or closed: both are what was wanted.
            return

    def _read(self) -> None:
        try:
            while data := self._receive():
                for reply in self._connection.receive(data):
                    self._deliver(reply)
        except ProtocolError:
            self._shut()
        finally:
            with self._lock:
                self._lost = True
                slots, self._slots = self._slots, {}
            for slot in slots.values():
                slot.arrived.set()
            if self._on_lost is not None:
                self._on_lost()

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(_RECEIVE_BYTES)
        except OSError:
            return b""

    def _deliver(self, reply: Reply) -> None:
        with self._lock:
            slot = self._slots.get(reply.stream_id)
        if slot is not None:
            slot.reply = reply
            slot.arrived.set()
