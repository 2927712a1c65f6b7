"""The front-end of vhost-user: hands guest memory and queues to a daemon that serves a device.

The daemon is a process of the host but not trusted to behave. Every exchange ends within
ANSWER_TIMEOUT_S; a daemon that is silent, says what nobody asked for, refuses or is gone is *lost*:
its connection is shut for good and each further call raises at once.

Source: QEMU docs/interop/vhost-user.rst. Of the protocol's features only REPLY_ACK is used, so that
every step is known to be done before the next.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.memory import SharedRegion
from vmcell_runtime.virtio import vhost_user_abi as wire
from vmcell_runtime.virtio.queue import RingLayout

ANSWER_TIMEOUT_S = 3.0  # less than the VMM grants a vCPU to stop: one may be waiting here


class Ring(NamedTuple):
    """One queue to hand over: where it lies, who notifies the back-end, whom it interrupts."""

    layout: RingLayout
    kick_fd: int
    call_fd: int


class FrontEnd:
    """One connection to a back-end. Owns `sock` (unix, stream, connected); `close` is idempotent.

    One thread at a time may call; `lose` and `fileno` also another. HostError when the back-end is
    lost, at that moment or before.
    """

    def __init__(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise CallerError("a vhost-user connection must be a unix stream socket")
        self._sock = sock
        self._sock.setblocking(False)
        self.lost = ""
        self.features = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def ask_features(self, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """What the back-end offers: the first thing to ask, and a sign that it serves."""
        with _Exchange(self, timeout_s) as exchange:
            return wire.read_u64(exchange.ask(wire.GET_FEATURES))

    def negotiate(self) -> None:
        """Agrees on the protocol and claims the back-end; `features` are known afterwards."""
        with _Exchange(self, ANSWER_TIMEOUT_S) as exchange:
            self.features = wire.read_u64(exchange.ask(wire.GET_FEATURES))
            if not self.features & wire.F_PROTOCOL_FEATURES:
                raise HostError("the vhost-user back-end knows no protocol features")
            protocol = wire.read_u64(exchange.ask(wire.GET_PROTOCOL_FEATURES))
            if not protocol & wire.PROTOCOL_F_REPLY_ACK:
                raise HostError("the vhost-user back-end cannot acknowledge (REPLY_ACK)")
            exchange.send(wire.SET_PROTOCOL_FEATURES, wire.u64(wire.PROTOCOL_F_REPLY_ACK))
            exchange.tell(wire.SET_OWNER)

    def start(self, features: int, regions: Sequence[SharedRegion], rings: Sequence[Ring]) -> None:
        """Hands over memory and queues of one activation; the back-end works when it returns."""
        wanted = features & self.features | wire.F_PROTOCOL_FEATURES
        with _Exchange(self, ANSWER_TIMEOUT_S) as exchange:
            exchange.tell(wire.SET_FEATURES, wire.u64(wanted))
            table = wire.memory_table(regions)
            exchange.tell(wire.SET_MEM_TABLE, table, [region.fd for region in regions])
            for index, ring in enumerate(rings):
                state = wire.vring_state(index, ring.layout.size)
                exchange.tell(wire.SET_VRING_NUM, state)
                exchange.tell(wire.SET_VRING_BASE, wire.vring_state(index, 0))
                exchange.tell(wire.SET_VRING_ADDR, wire.vring_addresses(index, ring.layout))
                exchange.tell(wire.SET_VRING_CALL, wire.u64(index), [ring.call_fd])
                exchange.tell(wire.SET_VRING_KICK, wire.u64(index), [ring.kick_fd])
            for index in range(len(rings)):
                exchange.tell(wire.SET_VRING_ENABLE, wire.vring_state(index, 1))

    def stop(self, ring_count: int) -> None:
        """Takes the queues back: when it returns the back-end touches none of them any more."""
        with _Exchange(self, ANSWER_TIMEOUT_S) as exchange:
            for index in range(ring_count):
                payload = exchange.ask(wire.GET_VRING_BASE, wire.vring_state(index, 0))
                if wire.read_vring_state(payload)[0] != index:
                    raise HostError(f"the vhost-user back-end stopped a queue that is not {index}")

    def lose(self, reason: str) -> None:
        """Gives the back-end up for good; the first reason stays."""
        if not self.lost:
            self.lost = reason
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has gone already, which is what is wanted

    def close(self) -> None:
        self.lost = self.lost or "the connection to the vhost-user back-end is closed"
        self._sock.close()


class _Exchange:
    """A few messages that share one deadline; whatever goes wrong loses the back-end."""

    def __init__(self, front_end: FrontEnd, timeout_s: float) -> None:
        self._front_end = front_end
        self._sock = front_end._sock
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def __enter__(self) -> _Exchange:
        if self._front_end.lost:
            raise HostError(self._front_end.lost)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            reason = f"the vhost-user back-end is gone: {error.strerror or error}"
            self._front_end.lose(reason)
            raise HostError(reason) from error
        if isinstance(error, HostError):
            self._front_end.lose(str(error))

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """One message that is not answered; messages are small, so they go whole or not at all."""
        self._send(wire.encode(request, payload), request, fds)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """One message, done when this returns."""
        self._send(wire.encode(request, payload, need_reply=True), request, fds)
        result = wire.read_u64(self._receive(request))
        if result:
            raise HostError(f"the vhost-user back-end refused request {request} with {result}")

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """One question; the eight bytes of the answer."""
        self._send(wire.encode(request, payload), request, ())
        return self._receive(request)

    def _send(self, message: bytes, request: int, fds: Sequence[int]) -> None:
        try:
            sent = socket.send_fds(self._sock, [message], list(fds), socket.MSG_NOSIGNAL)
        except BlockingIOError as error:
            raise HostError(f"the vhost-user back-end takes no request {request}") from error
        if sent != len(message):
            raise HostError(f"the vhost-user back-end took {sent} bytes of request {request}")

    def _receive(self, request: int) -> bytes:
        header = self._read(wire.HEADER.size, request)
        wire.check_answer_header(request, header)
        return self._read(wire.ANSWER_BYTES, request)

    def _read(self, length: int, request: int) -> bytes:
        data = b""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while len(data) < length:
            left_ms = int((self._deadline - time.monotonic()) * 1000)
            if left_ms <= 0 or not poll.poll(left_ms):
                raise HostError(
                    f"the vhost-user back-end did not answer request {request} within "
                    f"{self._timeout_s:g} s",
                    code="deadline_exceeded",
                )
            try:
                # Without room for control data the kernel drops descriptors nobody asked for.
                piece = self._sock.recv(length - len(data))
            except BlockingIOError:
                continue
            if not piece:
                raise HostError("the vhost-user back-end closed its connection")
            data += piece
        return data
