"""One activation of the socket device: which packet belongs to which stream, and who goes on when.

Nothing waits for a slow stream: a host socket that takes nothing is withheld credit, a guest socket
without credit is not read for, and streams that found no receive buffer go on when the guest brings
new ones. All calls under the transport's lock, on the event loop's thread.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import deque
from functools import partial
from select import EPOLLERR, EPOLLHUP, EPOLLIN

from vmcell_protos.errors import GuestError, HostError
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import spans
from vmcell_runtime.virtio.device import Activation
from vmcell_runtime.virtio.queue import Chain
from vmcell_runtime.virtio.spans import Spans
from vmcell_runtime.virtio.vsock import packet
from vmcell_runtime.virtio.vsock.connection import (
    CREDIT_OPS,
    Action,
    Connection,
    Event,
    State,
    event_of,
)
from vmcell_runtime.virtio.vsock.delivery import MAX_BURST_BUFFERS, Delivery
from vmcell_runtime.virtio.vsock.packet import Header
from vmcell_runtime.virtio.vsock.stream import FIRST_BURST_BUFFERS, OnResult, Stream

MAX_STREAMS = 256
MAX_CONTROL_PACKETS = 1024
FIRST_HOST_PORT = 1 << 30  # host ports that streams dialled by the host come from
RX, TX, EVENT = 0, 1, 2
GONE = EPOLLHUP | EPOLLERR

Listeners = dict[int, deque[socket.socket]]
"""Host port → sockets, each to be joined to one connection of the guest."""


class Mux:
    """The streams of one activation; `listeners` is shared with the device."""

    def __init__(
        self,
        memory: GuestMemory,
        loop: EventLoop,
        activation: Activation,
        guest_cid: int,
        listeners: Listeners,
    ) -> None:
        self._memory = memory
        self._loop = loop
        self._link = activation.link
        self._rx, self._tx, self._events = activation.queues
        self._guest_cid = guest_cid
        self._listeners = listeners
        self._delivery = Delivery(memory, self._rx)
        self._streams: dict[tuple[int, int], Stream] = {}
        self._closing: set[Stream] = set()
        self._waiting: dict[Stream, None] = {}  # for receive buffers, in order
        self._tx_paused = False
        self._next_host_port = FIRST_HOST_PORT

    # Entries

    def process(self, queue_index: int) -> bool:
        more = False
        if queue_index == RX:
            self._on_buffers()
        elif queue_index == TX:
            more = self._on_packets()
        self._finish()
        return more

    def dial(
        self, guest_port: int, sock: socket.socket, on_result: OnResult, timeout_ns: int
    ) -> None:
        """Asks the guest for a stream to `guest_port`; `on_result` is told once."""
        host_port = self._free_host_port(guest_port)
        if host_port is None:
            sock.close()
            error = HostError(
                f"the guest has {MAX_STREAMS} vsock streams already; close one",
                code="resource_exhausted",
            )
            self._loop.call_soon(partial(on_result, error))
            return
        stream = self._add_stream((host_port, guest_port), sock, State.CONNECTING)
        stream.on_result = on_result
        stream.connect_timer = self._loop.call_at(
            time.monotonic_ns() + timeout_ns, self._link.guard(partial(self._on_timeout, stream))
        )
        self._post(stream, packet.OP_REQUEST)
        self._finish()

    def reset_transport(self) -> None:
        """Tells the driver that all its connections are gone (§ 5.10.6.6): they were another's.

        A driver that offered no buffer for events, as before it is ready, has no connections. What
        the guest has not closed yet it still knows by its ports, so the next ones are others.
        """
        self._next_host_port = FIRST_HOST_PORT | secrets.randbelow(FIRST_HOST_PORT)
        chain = self._events.pop()
        if chain is not None:
            spans.write(self._memory, chain.writable, packet.EVENT_TRANSPORT_RESET)
            self._events.complete(chain.head, len(packet.EVENT_TRANSPORT_RESET))
            self._link.signal(self._events)

    def give_up(self) -> list[Stream]:
        """Ends the activation; the caller closes the streams on the loop's thread."""
        streams = [*self._streams.values(), *self._closing]
        for stream in streams:
            self._tell(stream, HostError("the guest reset its vsock device"))
        self._streams.clear()
        self._closing.clear()
        self._waiting.clear()
        return streams

    # Guest to host

    def _on_packets(self) -> bool:
        if self._delivery.control_packets >= MAX_CONTROL_PACKETS:
            self._tx_paused = True  # the guest takes no answers, so it gets no more questions in
            return False
        return self._tx.drain(self._on_chain)

    def _on_chain(self, chain: Chain) -> None:
        header_span, payload = spans.split(chain.readable, packet.HEADER_BYTES)
        header = packet.decode(spans.read(self._memory, header_span))
        present = chain.readable_bytes - packet.HEADER_BYTES
        if header.length > packet.MAX_PAYLOAD_BYTES or header.length > present:
            raise GuestError(f"a vsock packet declares {header.length} bytes and brings {present}")
        if (header.source_cid, header.destination_cid) == (self._guest_cid, packet.HOST_CID):
            if header.length < present:
                payload = spans.split(payload, header.length)[0]
            self._on_packet(header, payload)
        self._tx.complete(chain.head, 0)

    def _on_packet(self, header: Header, payload: Spans) -> None:
        stream = self._streams.get((header.destination_port, header.source_port))
        if header.type != packet.TYPE_STREAM:
            self._refuse(header)
        elif stream is not None:
            self._on_stream_packet(stream, header, payload)
        elif header.op == packet.OP_REQUEST:
            self._accept(header)
        else:
            self._refuse(header)

    def _refuse(self, header: Header) -> None:
        if header.op != packet.OP_RST:
            self._delivery.post(partial(packet.reset_reply, header))

    def _accept(self, header: Header) -> None:
        waiting = self._listeners.get(header.destination_port)
        if not waiting or self._stream_count() >= MAX_STREAMS:
            self._refuse(header)
            return
        key = (header.destination_port, header.source_port)
        stream = self._add_stream(key, waiting.popleft(), State.OPEN)
        stream.connection.note_credit(header)
        self._post(stream, packet.OP_RESPONSE)
        stream.watch(read=True)

    def _on_stream_packet(self, stream: Stream, header: Header, payload: Spans) -> None:
        connection = stream.connection
        connection.note_credit(header)
        if header.op == packet.OP_RW:
            self._on_data(stream, payload, header.length)
        elif header.op == packet.OP_CREDIT_REQUEST:
            self._post_credit(stream)
        elif header.op not in CREDIT_OPS:
            self._advance(stream, event_of(header))
        if stream.out_of_credit and connection.peer_room_bytes:
            stream.out_of_credit = False
            self._pump(stream)

    def _on_data(self, stream: Stream, payload: Spans, length: int) -> None:
        connection = stream.connection
        if connection.state is State.CONNECTING or not connection.receive(length):
            self._advance(stream, Event.PEER_NONSENSE)
            return
        if connection.may_receive:
            stream.deliver(self._memory, payload, length)
            self._look_after(stream)
        else:
            connection.hand_on(length)  # sent before the guest knew that nobody takes it

    # Host to guest

    def _on_buffers(self) -> None:
        waiting, self._waiting = self._waiting, {}
        if self._delivery.send_control() and self._tx_paused:
            self._tx_paused = False
            self._link.process_soon(TX)
        for stream in waiting:
            if not stream.closed:
                self._pump(stream)

    def _on_ready(self, stream: Stream, events: int) -> None:
        if stream.closed:
            return
        stream.flush()
        if events & GONE:
            stream.drop_pending()
        if events & (EPOLLIN | GONE):
            self._pump(stream)
        self._look_after(stream)
        self._finish()

    def _pump(self, stream: Stream) -> None:
        """One burst from the host socket into the guest's buffers."""
        connection = stream.connection
        if not connection.may_send or stream.closed:
            return
        if not connection.peer_room_bytes:
            if not stream.out_of_credit:
                stream.out_of_credit = True
                self._post(stream, packet.OP_CREDIT_REQUEST)
            stream.watch(read=False)
            return
        try:
            burst = (
                self._delivery.receive(stream.fd, connection, stream.burst_buffers)
                if self._delivery.send_control()
                else None
            )
        except BlockingIOError:
            stream.burst_buffers = FIRST_BURST_BUFFERS
            stream.watch(read=True)
            return
        except ConnectionResetError:
            stream.drop_pending()
            burst = (0, 0)
        if burst is None:
            self._waiting[stream] = None
            stream.watch(read=False)
            return
        count, asked = burst
        if not count:
            stream.watch(read=False)
            self._advance(stream, Event.LOCAL_END)
            return
        if count == asked:
            stream.burst_buffers = min(2 * stream.burst_buffers, MAX_BURST_BUFFERS)
        stream.watch(read=True)

    # Life of a stream

    def _add_stream(self, key: tuple[int, int], sock: socket.socket, state: State) -> Stream:
        host_port, guest_port = key
        connection = Connection(
            local_cid=packet.HOST_CID,
            local_port=host_port,
            peer_cid=self._guest_cid,
            peer_port=guest_port,
            state=state,
        )
        stream = self._streams[key] = Stream(connection, key, sock, self._loop)
        stream.on_ready = self._link.guard(partial(self._on_ready, stream))
        return stream

    def _stream_count(self) -> int:
        return len(self._streams) + len(self._closing)

    def _free_host_port(self, guest_port: int) -> int | None:
        if self._stream_count() >= MAX_STREAMS:
            return None
        while (self._next_host_port, guest_port) in self._streams:
            self._step_host_port()
        port = self._next_host_port
        self._step_host_port()
        return port

    def _step_host_port(self) -> None:
        # The ports go round, so that one is not used again while the guest may remember it.
        self._next_host_port = FIRST_HOST_PORT | (self._next_host_port + 1) % FIRST_HOST_PORT

    def _on_timeout(self, stream: Stream) -> None:
        self._advance(stream, Event.TIMEOUT)
        self._finish()

    def _look_after(self, stream: Stream) -> None:
        """What follows from bytes handed on, or from a host side that takes no more."""
        if stream.deaf and stream.connection.may_receive:
            self._advance(stream, Event.LOCAL_DEAF)
        if stream.connection.credit_update_due and stream.connection.state is not State.CLOSED:
            self._post_credit(stream)
        if stream.closed:
            self._closing.discard(stream)
        elif stream.connection.may_send and not stream.out_of_credit:
            stream.watch(read=stream not in self._waiting)
        else:
            stream.watch(read=False)

    def _advance(self, stream: Stream, event: Event) -> None:
        for action in stream.connection.advance(event):
            match action:
                case Action.TELL_OPEN:
                    self._tell(stream, None)
                    stream.watch(read=True)
                case Action.TELL_REFUSED:
                    self._tell(stream, _refusal(stream.key[1], event))
                case Action.SEND_END:
                    self._post_shutdown(stream, packet.SHUTDOWN_SEND)
                case Action.SEND_DEAF:
                    self._post_shutdown(stream, packet.SHUTDOWN_RECEIVE)
                case Action.SEND_GONE:
                    self._post_shutdown(stream, packet.SHUTDOWN_SEND | packet.SHUTDOWN_RECEIVE)
                case Action.SEND_RST:
                    self._post(stream, packet.OP_RST)
                case Action.END_LOCAL_WRITES:
                    stream.end_writes()
                case Action.STOP_LOCAL_READS:
                    stream.stop_reads()
                case Action.CLOSE_LOCAL:
                    self._close(stream)
        if not stream.closed and not stream.connection.may_send:
            stream.watch(read=False)

    def _close(self, stream: Stream) -> None:
        del self._streams[stream.key]
        self._waiting.pop(stream, None)
        stream.close_when_flushed()
        if not stream.closed:
            self._closing.add(stream)
            stream.watch(read=False)

    def _tell(self, stream: Stream, error: HostError | GuestError | None) -> None:
        if stream.connect_timer is not None:
            stream.connect_timer.cancel()
            stream.connect_timer = None
        if stream.on_result is not None:
            self._loop.call_soon(partial(stream.on_result, error))
            stream.on_result = None

    # Packets to the guest

    def _post(self, stream: Stream, op: int) -> None:
        self._delivery.post(partial(stream.connection.header, op))

    def _post_shutdown(self, stream: Stream, flags: int) -> None:
        self._delivery.post(partial(stream.connection.header, packet.OP_SHUTDOWN, flags=flags))

    def _post_credit(self, stream: Stream) -> None:
        if stream.credit_update_queued:
            return
        stream.credit_update_queued = True

        def make_header() -> Header:
            stream.credit_update_queued = False
            return stream.connection.header(packet.OP_CREDIT_UPDATE)

        self._delivery.post(make_header)

    def _finish(self) -> None:
        """Every entry ends here: answers go out and the guest learns of them."""
        self._delivery.send_control()
        self._link.signal(self._rx, self._tx)


def _refusal(guest_port: int, event: Event) -> GuestError | HostError:
    if event is Event.TIMEOUT:
        return HostError(
            f"the guest did not answer a connection to vsock port {guest_port}; is it alive?",
            code="deadline_exceeded",
        )
    return GuestError(
        f"the guest refused a connection to vsock port {guest_port}; nothing listens there",
        code="unavailable",
    )
