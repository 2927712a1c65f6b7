"""Port forwards: the host's connections joined to servers on the loopback."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from agent_harness import AgentUnderTest, container_spec, process_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_agent import portdoor
from vmcell_agent.eventloop import Loop
from vmcell_agent.portdoor import PortDoor
from vmcell_protos.agent import HelloRequest


class Bench:
    """A door on an abstract unix socket, its loop turned by the test."""

    def __init__(self) -> None:
        self.loop = Loop()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen(200)
        self.address = listener.getsockname()
        self.door = PortDoor(self.loop, listener, lambda address: True)
        self.ends: list[socket.socket] = []

    def dial(self, first: bytes) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(self.address)
        client.sendall(first)
        self.ends.append(client)
        return client

    def server(self, family: socket.AddressFamily = socket.AF_INET) -> tuple[socket.socket, bytes]:
        """A listening server of the test's and the header that asks for it."""
        listener = socket.create_server(
            ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family, backlog=200
        )
        listener.settimeout(5)
        self.ends.append(listener)
        return listener, struct.pack("<H", listener.getsockname()[1])

    def run(self, work: Callable[[], None]) -> None:
        """Serve until `work`, in a thread, has ended; its error is the test's."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(work)

            def check() -> None:
                if done.done():
                    self.loop.stop()
                else:
                    self.loop.call_later(0.005, check)

            self.loop.call_later(0.005, check)
            self.loop.run()
            done.result()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = self.loop.call_later(5, self.loop.stop)

        def check() -> None:
            if condition():
                self.loop.stop()
            else:
                self.loop.call_later(0.005, check)

        self.loop.call_later(0.005, check)
        self.loop.run()
        deadline.cancel()
        assert condition()

    @property
    def forwards(self) -> int:
        return len(self.door._forwards)

    def close(self) -> None:
        self.door.close()
        for end in self.ends:
            end.close()
        self.loop.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_bytes_and_half_closes_pass_both_ways(bench: Bench, family: socket.AddressFamily) -> None:
    listener, header = bench.server(family)
    data = bytes(range(256)) * 4000

    def work() -> None:
        client = bench.dial(header + b"ask")
        server, _ = listener.accept()
        with server:
            server.settimeout(5)
            assert server.recv(3, socket.MSG_WAITALL) == b"ask"
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            sender = threading.Thread(
                target=lambda: (server.sendall(data), server.shutdown(socket.SHUT_WR))
            )
            sender.start()
            assert read_all(client) == data
            sender.join(timeout=5)

    bench.run(work)
    bench.until(lambda: bench.forwards == 0)


def test_the_server_may_close_first(bench: Bench) -> None:
    listener, header = bench.server()

    def work() -> None:
        client = bench.dial(header)
        server, _ = listener.accept()
        with server:
            server.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            client.sendall(b"late")
            client.shutdown(socket.SHUT_WR)
            assert read_all(server) == b"late"

    bench.run(work)
    bench.until(lambda: bench.forwards == 0)


def test_a_host_that_hangs_up_leaves_no_forward_to_an_idle_server(bench: Bench) -> None:
    listener, header = bench.server()
    servers: list[socket.socket] = []

    def work() -> None:
        for half_first in (False, True):
            client = bench.dial(header)
            servers.append(listener.accept()[0])
            servers[-1].settimeout(5)
            client.sendall(b"x")
            assert servers[-1].recv(1) == b"x"
            if half_first:
                client.shutdown(socket.SHUT_WR)
                assert servers[-1].recv(1) == b""
            client.close()

    bench.run(work)
    bench.until(lambda: bench.forwards == 0)
    for server in servers:
        server.close()


class VsockLike:
    """A connection that behaves as vsock does when its peer is gone: polls as half-closed only, and
    refuses to send nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.peer_gone = False

    def send(self, data: bytes) -> int:
        if self.peer_gone:
            raise BrokenPipeError(errno.EPIPE, "gone")
        return self.connection.send(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


def test_a_vsock_peer_that_is_gone_is_told_from_one_that_has_half_closed(bench: Bench) -> None:
    listener, header = bench.server()
    client = bench.dial(header)
    bench.until(lambda: bench.forwards == 1)
    (forward,) = bench.door._forwards
    like = VsockLike(forward._host)
    forward._host = like  # type: ignore[assignment]
    client.shutdown(socket.SHUT_WR)
    bench.until(lambda: forward._host_state >= 0)
    bench.loop.call_later(0.05, bench.loop.stop)
    bench.loop.run()
    assert bench.forwards == 1
    like.peer_gone = True
    client.shutdown(socket.SHUT_RD)  # a change of state, which is an edge for epoll
    bench.until(lambda: bench.forwards == 0)
    listener.close()


def test_a_port_where_nobody_listens_is_a_closed_connection(bench: Bench) -> None:
    listener, header = bench.server()
    listener.close()

    def work() -> None:
        for first in (header, b"\0\0"):
            assert bench.dial(first).recv(1) == b""

    bench.run(work)
    assert bench.forwards == 0


def test_a_server_that_does_not_take_the_connection_is_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portdoor, "CONNECT_SECONDS", 0.2)
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    header = struct.pack("<H", listener.getsockname()[1])
    bench.ends.append(listener)
    full = []
    for _ in range(4):  # more than the backlog: the last ones wait for their handshake
        waiting = socket.socket()
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
        full.append(waiting)
    bench.run(lambda: read_all(bench.dial(header)) and None)
    assert bench.forwards == 0
    for waiting in full:
        waiting.close()


def test_forwards_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portdoor, "MAX_FORWARDS", 3)
    listener, header = bench.server()
    for _ in range(3):
        bench.dial(header)
    bench.until(lambda: bench.forwards == 3)
    bench.run(lambda: read_all(bench.dial(header)) and None)
    assert bench.forwards == 3
    listener.close()


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=6))
def test_any_first_bytes_end_in_a_forward_or_a_close(first: bytes) -> None:
    bench = Bench()
    # ports below 64 of a machine that runs tests have no server that answers
    client = bench.dial(first[:1] + b"\0" + first[1:])
    client.shutdown(socket.SHUT_WR)
    bench.until(lambda: bench.forwards == 0 and not bench.door._door._unnamed)
    bench.close()


@pytest.mark.root
def test_a_server_in_a_container_is_reached(agent: AgentUnderTest) -> None:
    script = "mkdir /run/w; echo served >/run/w/x; httpd -p 8080 -h /run/w; echo up; sleep 1000"
    init = agent.create(container_spec(process_spec("sh", "-c", script))).start()
    init.read_until(b"up\n")
    before = agent.open_files()
    for _ in range(20):
        with agent.forward(8080) as connection:
            connection.sendall(b"GET /x HTTP/1.0\r\n\r\n")
            assert read_all(connection).endswith(b"\r\n\r\nserved\n")
    with agent.forward(8081) as connection:
        assert connection.recv(1) == b""
    agent.client.call("Hello", HelloRequest())
    assert agent.open_files() == before
