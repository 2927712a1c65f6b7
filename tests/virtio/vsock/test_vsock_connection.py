"""Two ends of a connection joined back to back: bytes, credit and every order of ending."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmcell_runtime.virtio.vsock import packet
from vmcell_runtime.virtio.vsock.connection import (
    BUFFER_BYTES,
    TABLE,
    Action,
    Connection,
    Event,
    State,
    event_of,
)
from vmcell_runtime.virtio.vsock.packet import Header

SHUTDOWN_FLAGS = {
    Action.SEND_END: packet.SHUTDOWN_SEND,
    Action.SEND_DEAF: packet.SHUTDOWN_RECEIVE,
    Action.SEND_GONE: packet.SHUTDOWN_SEND | packet.SHUTDOWN_RECEIVE,
}


class End:
    """One side: a connection, the packets under way to it, and what its program got."""

    def __init__(self, number: int, state: State) -> None:
        self.connection = Connection(
            local_cid=2 + number, local_port=1, peer_cid=3 - number, peer_port=1, state=state
        )
        self.peer: End = self
        self.inbox: deque[tuple[Header, bytes]] = deque()
        self.buffered = bytearray()
        self.taken = bytearray()
        self.given = bytearray()
        self.actions: list[Action] = []
        self.ended = False
        self.abandoned = False

    def post(self, op: int, data: bytes = b"", flags: int = 0) -> None:
        header = self.connection.header(op, length=len(data), flags=flags)
        self.connection.note_sent(len(data))
        self.peer.inbox.append((packet.decode(header.encode()), data))

    def act(self, event: Event) -> None:
        for action in self.connection.advance(event):
            self.actions.append(action)
            if action in SHUTDOWN_FLAGS:
                self.post(packet.OP_SHUTDOWN, flags=SHUTDOWN_FLAGS[action])
            elif action is Action.SEND_RST:
                self.post(packet.OP_RST)

    def write(self, data: bytes) -> None:
        """As much as there is credit for."""
        part = data[: self.connection.peer_room_bytes]
        if part:
            self.given += part
            self.post(packet.OP_RW, part)

    def take(self, length: int) -> None:
        """The program takes bytes out of the buffer."""
        part = self.buffered[:length]
        del self.buffered[:length]
        self.taken += part
        self.connection.hand_on(len(part))
        if self.connection.credit_update_due and self.connection.state is not State.CLOSED:
            self.post(packet.OP_CREDIT_UPDATE)

    def handle(self) -> None:
        """One packet out of the inbox."""
        header, data = self.inbox.popleft()
        if self.connection.state is State.CLOSED:
            return
        self.connection.note_credit(header)
        if header.op == packet.OP_RW:
            assert self.connection.receive(len(data)), "a peer that keeps to its credit fits"
            if self.connection.may_receive:
                self.buffered += data
            else:
                self.connection.hand_on(len(data))
        elif header.op not in (packet.OP_CREDIT_UPDATE, packet.OP_CREDIT_REQUEST):
            self.act(event_of(header))


class TwoEnds(RuleBasedStateMachine):
    """Bytes arrive in order and none is lost unless somebody went deaf; both ends close."""

    @initialize()
    def set_up(self) -> None:
        self.ends = [End(0, State.CONNECTING), End(1, State.OPEN)]
        self.ends[0].peer, self.ends[1].peer = self.ends[1], self.ends[0]
        self.ends[1].connection.note_credit(self.ends[0].connection.header(packet.OP_REQUEST))
        self.ends[1].post(packet.OP_RESPONSE)
        self.ends[0].handle()
        self.clock = 0

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 2, 1000, 65536]))
    def write(self, side: int, size: int) -> None:
        end = self.ends[side]
        if end.connection.may_send and not end.ended:
            self.clock = (self.clock + 1) % 251
            end.write(bytes([self.clock]) * size)

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 5000, 1 << 20]))
    def take(self, side: int, size: int) -> None:
        self.ends[side].take(size)

    @rule(side=st.integers(0, 1), packets=st.integers(1, 20))
    def handle(self, side: int, packets: int) -> None:
        end = self.ends[side]
        for _ in range(min(packets, len(end.inbox))):
            end.handle()

    @rule(side=st.integers(0, 1))
    def end_sending(self, side: int) -> None:
        end = self.ends[side]
        if not end.ended:
            end.ended = True
            end.act(Event.LOCAL_END)

    @precondition(lambda self: all(not end.abandoned for end in self.ends))
    @rule(side=st.integers(0, 1))
    def go_deaf(self, side: int) -> None:
        self.ends[side].abandoned = True
        self.ends[side].act(Event.LOCAL_DEAF)

    @invariant()
    def bytes_come_in_order(self) -> None:
        for end in getattr(self, "ends", []):
            got = bytes(end.taken + end.buffered)
            assert bytes(end.peer.given[: len(got)]) == got
            assert len(end.buffered) <= BUFFER_BYTES

    def teardown(self) -> None:
        if not hasattr(self, "ends"):
            return
        for end in self.ends:
            if not end.ended:
                end.ended = True
                end.act(Event.LOCAL_END)
        for _ in range(10):
            for end in self.ends:
                while end.inbox:
                    end.handle()
                end.take(1 << 30)
        for end in self.ends:
            assert end.connection.state is State.CLOSED
            assert end.actions.count(Action.CLOSE_LOCAL) == 1
            if not end.abandoned:
                assert end.taken == end.peer.given


TwoEnds.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTwoEnds = TwoEnds.TestCase


def _pair() -> tuple[End, End]:
    a, b = End(0, State.OPEN), End(1, State.OPEN)
    a.peer, b.peer = b, a
    for end in (a, b):
        end.connection.note_credit(end.peer.connection.header(packet.OP_CREDIT_UPDATE))
    return a, b


def test_byte_by_byte_through_more_than_a_window() -> None:
    a, b = _pair()
    sent = 0
    while sent < BUFFER_BYTES + 1000:
        if a.connection.peer_room_bytes:
            a.write(bytes([sent % 256]))
            sent += 1
            b.handle()
            b.take(1)
        else:
            while a.inbox:
                a.handle()
            assert a.connection.peer_room_bytes
    assert bytes(b.taken) == bytes(n % 256 for n in range(sent))


def test_counters_wrap_at_32_bits() -> None:
    a, b = _pair()
    for end in (a, b):
        end.connection._sent = end.connection._peer_fwd_cnt = 0xFFFF_FF00
        end.connection._received = end.connection._handed_on = 0xFFFF_FF00
        end.connection._handed_on_told = 0xFFFF_FF00
    for _ in range(10):
        a.write(b"x" * BUFFER_BYTES)
        b.handle()
        b.take(BUFFER_BYTES)
        a.handle()
    assert len(b.taken) == 10 * BUFFER_BYTES


@pytest.mark.parametrize("alloc", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("forwarded", [0, 1, 2**31, 2**32 - 1])
def test_room_is_never_negative(alloc: int, forwarded: int) -> None:
    a, _ = _pair()
    a.write(b"abc")
    header = a.connection.header(packet.OP_CREDIT_UPDATE)
    a.connection.note_credit(header._replace(buf_alloc=alloc, fwd_cnt=forwarded))
    assert 0 <= a.connection.peer_room_bytes <= alloc


def test_every_state_has_a_row_for_every_packet_and_ends_in_closed() -> None:
    live = [state for state in State if state is not State.CLOSED]
    for state in live:
        assert (state, Event.PEER_RST) in TABLE
        assert (state, Event.PEER_NONSENSE) in TABLE
        if state is not State.CONNECTING:
            for event in (Event.PEER_END, Event.PEER_DEAF, Event.PEER_GONE):
                assert (state, event) in TABLE
            assert (state, Event.LOCAL_END) in TABLE
            assert (state, Event.LOCAL_DEAF) in TABLE
    for state, actions in TABLE.values():
        assert (state is State.CLOSED) == (Action.CLOSE_LOCAL in actions)


@pytest.mark.parametrize(
    ("op", "flags", "event"),
    [
        (packet.OP_SHUTDOWN, 0, Event.PEER_NONSENSE),
        (packet.OP_SHUTDOWN, 1, Event.PEER_DEAF),
        (packet.OP_SHUTDOWN, 2, Event.PEER_END),
        (packet.OP_SHUTDOWN, 3, Event.PEER_GONE),
        (packet.OP_RESPONSE, 0, Event.PEER_RESPONSE),
        (packet.OP_REQUEST, 0, Event.PEER_NONSENSE),
        (0, 0, Event.PEER_NONSENSE),
        (8, 0, Event.PEER_NONSENSE),
    ],
)
def test_what_packets_mean(op: int, flags: int, event: Event) -> None:
    assert event_of(Header(3, 2, 1, 1, 0, 1, op, flags, 0, 0)) is event


def test_header_layout() -> None:
    header = Header(0x0807060504030201, 2, 3, 4, 5, 1, 6, 7, 8, 9)
    raw = header.encode()
    assert len(raw) == 44
    assert raw[:8] == bytes(range(1, 9))
    assert packet.decode(raw) == header
