"""One vsock stream: its life as a table and its credit as counters. No I/O, no sockets.

The two directions of a stream end one by one. "End" means the side sends no more, "deaf" that it
receives no more, "gone" both. The peer learns of each by SHUTDOWN with the flags of all that has
ended so far; when both directions have ended, whoever is told answers RST and the stream is closed
(virtio 1.2 § 5.10.6.6.1; Linux net/vmw_vsock/virtio_transport_common.c, 6.12, does the same).

         OPEN ──LOCAL_END──▸ SEND_ENDED ──PEER_END──▸
           │                                          BOTH_ENDED ──PEER_RST──▸ CLOSED
           └───PEER_END──▸ RECEIVE_ENDED ─LOCAL_END─▸

The table knows "local" and "peer" only, so two connections joined back to back are a whole stream.

Credit (§ 5.10.6.3): each side says how much it can hold (`buf_alloc`) and how much of what it got
it has handed on (`fwd_cnt`, modulo 2**32); the other may have no more than that under way.
"""

from __future__ import annotations

from enum import Enum, auto

from vmcell_runtime.virtio.vsock import packet
from vmcell_runtime.virtio.vsock.packet import Header

BUFFER_BYTES = 256 << 10
"""What we hold for one stream when its host side does not take it."""

CREDIT_UPDATE_BYTES = BUFFER_BYTES // 2
"""The peer is told of free room once this much of it is news."""

_COUNTER = 0xFFFF_FFFF


class State(Enum):
    CONNECTING = auto()
    OPEN = auto()
    SEND_ENDED = auto()
    RECEIVE_ENDED = auto()
    BOTH_ENDED = auto()
    CLOSED = auto()


class Event(Enum):
    PEER_RESPONSE = auto()
    PEER_END = auto()
    PEER_DEAF = auto()
    PEER_GONE = auto()
    PEER_RST = auto()
    PEER_NONSENSE = auto()
    LOCAL_END = auto()
    LOCAL_DEAF = auto()
    TIMEOUT = auto()


class Action(Enum):
    """What the owner of the connection must do, in the order given."""

    TELL_OPEN = auto()
    TELL_REFUSED = auto()
    SEND_END = auto()
    SEND_DEAF = auto()
    SEND_GONE = auto()
    SEND_RST = auto()
    END_LOCAL_WRITES = auto()
    STOP_LOCAL_READS = auto()
    CLOSE_LOCAL = auto()


_Row = tuple[State, tuple[Action, ...]]

_REFUSED: _Row = (State.CLOSED, (Action.TELL_REFUSED, Action.CLOSE_LOCAL))
_GIVEN_UP: _Row = (State.CLOSED, (Action.SEND_RST, Action.TELL_REFUSED, Action.CLOSE_LOCAL))
_LAST_WORD: _Row = (State.CLOSED, (Action.SEND_RST, Action.CLOSE_LOCAL))
_GONE: _Row = (State.CLOSED, (Action.CLOSE_LOCAL,))

TABLE: dict[tuple[State, Event], _Row] = {
    (State.CONNECTING, Event.PEER_RESPONSE): (State.OPEN, (Action.TELL_OPEN,)),
    (State.CONNECTING, Event.PEER_RST): _REFUSED,
    (State.CONNECTING, Event.TIMEOUT): _GIVEN_UP,
    (State.CONNECTING, Event.PEER_NONSENSE): _GIVEN_UP,
    (State.OPEN, Event.PEER_END): (State.RECEIVE_ENDED, (Action.END_LOCAL_WRITES,)),
    (State.OPEN, Event.PEER_DEAF): (
        State.SEND_ENDED,
        (Action.STOP_LOCAL_READS, Action.SEND_END),
    ),
    (State.OPEN, Event.PEER_GONE): _LAST_WORD,
    (State.OPEN, Event.PEER_RST): _GONE,
    (State.OPEN, Event.PEER_NONSENSE): _LAST_WORD,
    (State.OPEN, Event.LOCAL_END): (State.SEND_ENDED, (Action.SEND_END,)),
    (State.OPEN, Event.LOCAL_DEAF): (State.RECEIVE_ENDED, (Action.SEND_DEAF,)),
    (State.SEND_ENDED, Event.PEER_END): (
        State.BOTH_ENDED,
        (Action.END_LOCAL_WRITES, Action.SEND_GONE),
    ),
    (State.SEND_ENDED, Event.PEER_DEAF): (State.SEND_ENDED, ()),
    (State.SEND_ENDED, Event.PEER_GONE): _LAST_WORD,
    (State.SEND_ENDED, Event.PEER_RST): _GONE,
    (State.SEND_ENDED, Event.PEER_NONSENSE): _LAST_WORD,
    (State.SEND_ENDED, Event.LOCAL_END): (State.SEND_ENDED, ()),
    (State.SEND_ENDED, Event.LOCAL_DEAF): (State.BOTH_ENDED, (Action.SEND_GONE,)),
    (State.RECEIVE_ENDED, Event.PEER_END): (State.RECEIVE_ENDED, ()),
    (State.RECEIVE_ENDED, Event.PEER_DEAF): _LAST_WORD,
    (State.RECEIVE_ENDED, Event.PEER_GONE): _LAST_WORD,
    (State.RECEIVE_ENDED, Event.PEER_RST): _GONE,
    (State.RECEIVE_ENDED, Event.PEER_NONSENSE): _LAST_WORD,
    (State.RECEIVE_ENDED, Event.LOCAL_END): (State.BOTH_ENDED, (Action.SEND_GONE,)),
    (State.RECEIVE_ENDED, Event.LOCAL_DEAF): (State.RECEIVE_ENDED, ()),
    (State.BOTH_ENDED, Event.PEER_END): (State.BOTH_ENDED, ()),
    (State.BOTH_ENDED, Event.PEER_DEAF): (State.BOTH_ENDED, ()),
    (State.BOTH_ENDED, Event.PEER_GONE): _LAST_WORD,
    (State.BOTH_ENDED, Event.PEER_RST): _GONE,
    (State.BOTH_ENDED, Event.PEER_NONSENSE): _LAST_WORD,
    (State.BOTH_ENDED, Event.LOCAL_END): (State.BOTH_ENDED, ()),
    (State.BOTH_ENDED, Event.LOCAL_DEAF): (State.BOTH_ENDED, ()),
}

SHUTDOWN_EVENTS: dict[int, Event] = {
    packet.SHUTDOWN_RECEIVE: Event.PEER_DEAF,
    packet.SHUTDOWN_SEND: Event.PEER_END,
    packet.SHUTDOWN_RECEIVE | packet.SHUTDOWN_SEND: Event.PEER_GONE,
}

# op → event; RW and the credit messages are not part of the life of a stream
_OP_EVENTS: dict[int, Event] = {
    packet.OP_RESPONSE: Event.PEER_RESPONSE,
    packet.OP_RST: Event.PEER_RST,
}

CREDIT_OPS = (packet.OP_CREDIT_UPDATE, packet.OP_CREDIT_REQUEST)

_SENDING = (State.OPEN, State.RECEIVE_ENDED)
_RECEIVING = (State.OPEN, State.SEND_ENDED)


def event_of(header: Header) -> Event:
    """What a packet that is neither data nor credit means for the life of its stream."""
    if header.op == packet.OP_SHUTDOWN:
        return SHUTDOWN_EVENTS.get(header.flags & 3, Event.PEER_NONSENSE)
    return _OP_EVENTS.get(header.op, Event.PEER_NONSENSE)


class Connection:
    """One end of a stream between `local_port` and `peer_port`."""

    def __init__(
        self, *, local_cid: int, local_port: int, peer_cid: int, peer_port: int, state: State
    ) -> None:
        self.state = state
        self._addresses = (local_cid, peer_cid, local_port, peer_port)
        self._sent = 0
        self._peer_buf_alloc = 0
        self._peer_fwd_cnt = 0
        self._received = 0
        self._handed_on = 0
        self._handed_on_told = 0

    def advance(self, event: Event) -> tuple[Action, ...]:
        """Takes one event; what the state has no row for is the peer's nonsense."""
        if self.state is State.CLOSED:
            return ()
        row = TABLE.get((self.state, event))
        if row is None:
            row = TABLE[self.state, Event.PEER_NONSENSE]
        self.state, actions = row
        return actions

    @property
    def may_send(self) -> bool:
        """Local bytes still go to the peer."""
        return self.state in _SENDING

    @property
    def may_receive(self) -> bool:
        """The peer's bytes are still wanted."""
        return self.state in _RECEIVING

    @property
    def peer_room_bytes(self) -> int:
        """How much may be sent now; a peer that counts wrongly gets nothing or all it asks."""
        under_way = (self._sent - self._peer_fwd_cnt) & _COUNTER
        return max(0, self._peer_buf_alloc - under_way)

    @property
    def credit_update_due(self) -> bool:
        """The peer should hear of the room we have."""
        return self._handed_on - self._handed_on_told >= CREDIT_UPDATE_BYTES

    def note_credit(self, header: Header) -> None:
        """Every packet of the peer carries its credit."""
        self._peer_buf_alloc = header.buf_alloc
        self._peer_fwd_cnt = header.fwd_cnt

    def receive(self, length: int) -> bool:
        """Counts data of the peer; False if it had no credit for it."""
        self._received += length
        return self._received - self._handed_on <= BUFFER_BYTES

    def hand_on(self, length: int) -> None:
        """So much of what was received has left our buffer."""
        self._handed_on += length

    def note_sent(self, length: int) -> None:
        """Counts data sent to the peer."""
        self._sent = (self._sent + length) & _COUNTER

    def header(self, op: int, *, length: int = 0, flags: int = 0) -> Header:
        """The header of a packet about to be sent; its data is counted by `note_sent`."""
        self._handed_on_told = self._handed_on
        local_cid, peer_cid, local_port, peer_port = self._addresses
        return Header(
            local_cid,
            peer_cid,
            local_port,
            peer_port,
            length,
            packet.TYPE_STREAM,
            op,
            flags,
            BUFFER_BYTES,
            self._handed_on & _COUNTER,
        )
