"""The stream door and the control connection against a host that does not behave."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from agent_loop import run_until
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent import door as doors
from vmcell_agent.control import MAX_CALLS, ControlConnection
from vmcell_agent.eventloop import Loop
from vmcell_agent.process import exit_status
from vmcell_agent.streamdoor import StreamDoor
from vmcell_protos.agent import Empty
from vmcell_protos.errors import CallerError, VmcellError
from vmcell_protos.ttrpc import MAX_DATA_BYTES, REQUEST, ClientConnection, encode_frame
from vmcell_protos.wire import Message


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


class Door:
    """A stream door on an abstract unix socket."""

    def __init__(self, loop: Loop, *, accepts: bool = True) -> None:
        self.loop = loop
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen(200)
        self.address = listener.getsockname()
        self.door = StreamDoor(loop, listener, lambda address: accepts)
        self.dialled: dict[int, socket.socket] = {}
        self.clients: list[socket.socket] = []

    def expect(self, stream_id: int) -> bool:
        return self.door.expect(stream_id, lambda s: self.dialled.__setitem__(stream_id, s))

    def dial(self, first: bytes) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(self.address)
        client.sendall(first)
        self.clients.append(client)
        return client

    def close(self) -> None:
        self.door.close()
        for end in (*self.clients, *self.dialled.values()):
            end.close()


@pytest.fixture
def door(loop: Loop) -> Iterator[Door]:
    made = Door(loop)
    yield made
    made.close()


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_a_stream_goes_to_who_expects_its_id_with_the_bytes_behind_it(door: Door) -> None:
    assert door.expect(7)
    assert not door.expect(7)
    client = door.dial(struct.pack("<Q", 7)[:3])
    client.sendall(struct.pack("<Q", 7)[3:] + b"data")
    run_until(door.loop, lambda: 7 in door.dialled)
    assert door.dialled[7].recv(10) == b"data"


def test_an_id_nobody_expects_is_closed(door: Door) -> None:
    door.expect(7)
    door.door.forget(7)
    strangers = [door.dial(struct.pack("<Q", 7)), door.dial(struct.pack("<Q", 8))]
    run_until(door.loop, lambda: all(is_closed(client) for client in strangers))


def test_a_peer_that_is_not_the_host_is_closed(loop: Loop) -> None:
    door = Door(loop, accepts=False)
    door.expect(7)
    client = door.dial(struct.pack("<Q", 7))
    run_until(loop, lambda: is_closed(client))
    assert not door.dialled
    door.close()


def test_unnamed_streams_are_bounded_in_number_and_time(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "HEADER_SECONDS", 0.2)
    idle = [door.dial(b"") for _ in range(doors.MAX_UNNAMED + 5)]
    run_until(door.loop, lambda: sum(map(is_closed, idle)) == 5)
    run_until(door.loop, lambda: all(map(is_closed, idle)))
    door.expect(1)
    door.dial(struct.pack("<Q", 1))
    run_until(door.loop, lambda: 1 in door.dialled)


class Control:
    """A control connection whose service notes the calls and leaves the answers to the test."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.host, near = socket.socketpair()
        self.host.settimeout(5)
        self.calls: list[tuple[str, bytes, Callable[[Message | VmcellError], None]]] = []
        self.lost: list[str] = []
        self.connection = ControlConnection(loop, near, self._dispatch, self.lost.append)

    def _dispatch(
        self,
        service: str,
        method: str,
        payload: bytes,
        answer: Callable[[Message | VmcellError], None],
    ) -> None:
        self.calls.append((method, payload, answer))

    def close(self) -> None:
        self.connection.close()
        self.host.close()


@pytest.fixture
def control(loop: Loop) -> Iterator[Control]:
    made = Control(loop)
    yield made
    made.close()


def test_answers_come_in_any_order_and_errors_keep_their_code(control: Control) -> None:
    client = ClientConnection()
    ids = []
    for name in ("First", "Second"):
        stream_id, data = client.call("s", name, b"")
        ids.append(stream_id)
        control.host.sendall(data)
    run_until(control.loop, lambda: len(control.calls) == 2)
    control.calls[1][2](Empty())
    control.calls[0][2](CallerError("no", code="not_found"))
    replies = client.receive(control.host.recv(4096))
    assert [reply.stream_id for reply in replies] == ids[::-1]
    assert replies[1].error is not None
    assert replies[1].error.code == "not_found"


def test_an_oversize_request_is_an_error_and_the_connection_goes_on(control: Control) -> None:
    length = MAX_DATA_BYTES + 1
    head = struct.pack(">IIBB", length, 1, REQUEST, 0)
    control.host.setblocking(False)
    unsent = memoryview(head + bytes(length) + encode_frame(3, REQUEST, b""))
    client = ClientConnection()
    assert client.call("service", "Method", b"")[0] == 1  # it awaits one answer

    def feed() -> bool:
        nonlocal unsent
        try:
            unsent = unsent[control.host.send(unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise AssertionError("the agent hung up") from error
        return len(control.calls) == 1

    run_until(control.loop, feed)
    reply = client.receive(control.host.recv(4096))[0]
    assert reply.error is not None
    assert reply.error.code == "resource_exhausted"


def test_calls_left_open_are_bounded(control: Control) -> None:
    client = ClientConnection()
    data = b"".join(client.call("s", "Wait", b"")[1] for _ in range(MAX_CALLS + 1))
    control.host.sendall(data)
    run_until(control.loop, lambda: len(control.calls) == MAX_CALLS)
    reply = client.receive(control.host.recv(4096))[0]
    assert reply.error is not None
    assert reply.error.code == "resource_exhausted"
    for _, _, answer in control.calls:
        answer(Empty())


def test_the_hosts_end_is_told_once(control: Control) -> None:
    control.host.close()
    run_until(control.loop, lambda: bool(control.lost))
    assert control.lost == ["the host closed the control connection"]


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_end_in_an_answer_a_call_or_the_end(data: bytes) -> None:
    loop = Loop()
    control = Control(loop)
    control.host.sendall(data)
    control.host.shutdown(socket.SHUT_WR)
    run_until(loop, lambda: bool(control.lost))
    assert len(control.lost) == 1
    control.close()
    loop.close()


@pytest.mark.parametrize(
    ("wait_status", "status"),
    [(0, 0), (7 << 8, 7), (255 << 8, 255), (9, 137), (15, 143), (11 | 0x80, 139)],
)
def test_exit_status(wait_status: int, status: int) -> None:
    assert exit_status(wait_status) == status
