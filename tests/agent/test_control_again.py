"""The control connection after a reset: another host is dialled, or the end is told."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from agent_loop import run_until

from vmcell_agent import control as controls
from vmcell_agent.control import HostConnection
from vmcell_agent.eventloop import Loop
from vmcell_protos.agent import HelloResponse
from vmcell_protos.errors import CallerError, VmcellError
from vmcell_protos.ttrpc import ClientConnection, Reply
from vmcell_protos.wire import Message


class Host:
    """Both sides of a connection that breaks: the agent's, with a service that leaves the answers
    to the test, and the hosts', one after the other, on an abstract socket."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.listener: socket.socket | None = None
        self.address = ""
        self.far, near = socket.socketpair()
        self.protocol = ClientConnection()
        self.answers: list[Callable[[Message | VmcellError], None]] = []
        self.lost: list[str] = []
        self.resets = self.dialled = 0
        self.connection = HostConnection(
            self.loop, near, self.dial, self.dispatch, reset=self.on_reset, lost=self.lost.append
        )

    def on_reset(self) -> None:
        self.resets += 1

    def dispatch(
        self,
        service: str,
        method: str,
        payload: bytes,
        answer: Callable[[Message | VmcellError], None],
    ) -> None:
        self.answers.append(answer)

    def dial(self) -> socket.socket:
        self.dialled += 1
        made = socket.socket(socket.AF_UNIX)
        made.setblocking(False)
        try:
            made.connect(self.address or "\0vmcell-nobody-listens-here")
        except BlockingIOError:
            pass
        except OSError:
            made.close()
            raise
        return made

    def listen(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")
        self.listener.listen(1)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()

    def call(self, method: str) -> int:
        stream_id, data = self.protocol.call("s", method, b"")
        self.far.sendall(data)
        return stream_id

    def replies(self) -> list[Reply]:
        """What the agent has answered by now; at least one."""
        found: list[Reply] = []

        def arrived() -> bool:
            self.far.setblocking(False)
            if found:
                return True
            try:
                found.extend(self.protocol.receive(self.far.recv(4096)))
            except BlockingIOError:
                return False
            return bool(found)

        run_until(self.loop, arrived)
        return found

    def reset(self) -> None:
        """Closed with an answer unread, a unix socket tells its peer ECONNRESET."""
        answered = len(self.answers)
        self.call("Hello")
        run_until(self.loop, lambda: len(self.answers) > answered)
        self.answers[-1](HelloResponse())
        self.far.close()

    def accept(self) -> None:
        """The next host takes the agent's call."""
        accepted: list[socket.socket] = []

        def arrived() -> bool:
            assert self.listener is not None
            if accepted:
                return True
            try:
                accepted.append(self.listener.accept()[0])
            except BlockingIOError:
                return False
            return True

        run_until(self.loop, arrived)
        self.far, self.protocol = accepted[0], ClientConnection()

    def close(self) -> None:
        self.connection.close()
        self.far.close()
        if self.listener is not None:
            self.listener.close()
        self.loop.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


def test_after_a_reset_the_next_host_is_served(host: Host) -> None:
    host.listen()
    for number in range(3):
        host.reset()
        host.accept()
        stream_id = host.call("Hello")
        run_until(host.loop, lambda: len(host.answers) == 2 * (host.resets))
        host.answers[-1](HelloResponse(agent_version=str(number)))
        (reply,) = host.replies()
        assert (reply.stream_id, reply.error) == (stream_id, None)
        assert HelloResponse.decode(reply.payload).agent_version == str(number)
    assert host.resets == 3
    assert host.lost == []


def test_late_answers_to_the_host_before_go_nowhere(host: Host) -> None:
    host.listen()
    host.call("WaitProcess")
    host.call("WaitOom")
    run_until(host.loop, lambda: len(host.answers) == 2)
    host.reset()
    host.accept()
    stream_id = host.call("Hello")  # the same number as the first call of the other host
    run_until(host.loop, lambda: len(host.answers) == 4)
    assert stream_id == 1
    host.answers[0](HelloResponse(agent_version="late"))
    host.answers[1](CallerError("late"))
    host.answers[3](HelloResponse(agent_version="now"))
    (reply,) = host.replies()
    assert HelloResponse.decode(reply.payload).agent_version == "now"


def test_dialling_goes_on_until_somebody_listens(host: Host) -> None:
    host.reset()
    run_until(host.loop, lambda: host.dialled > 5)
    host.listen()
    host.accept()
    assert host.lost == []


def test_when_nobody_answers_that_is_the_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "DIAL_SECONDS", 0.2)
    host.reset()
    run_until(host.loop, lambda: bool(host.lost))
    assert host.lost == ["no host answers within 0.2 s: [Errno 111] Connection refused"]
    dialled = host.dialled
    assert dialled > 3
    host.loop.call_later(0.1, host.loop.stop)
    host.loop.run()
    assert (host.dialled, host.resets, len(host.lost)) == (dialled, 1, 1)


def test_a_socket_that_is_not_connected_yet_is_no_answer(host: Host) -> None:
    """A full backlog: connect(2) of a unix socket says EAGAIN and has begun nothing."""
    host.listen()
    waiting = []
    for _ in range(2):  # listen(1) takes two
        other = socket.socket(socket.AF_UNIX)
        other.connect(host.address)
        waiting.append(other)
    host.reset()
    run_until(host.loop, lambda: host.dialled > 3)
    for other in waiting:
        host.accept()
        host.far.close()
        other.close()
    host.accept()
    host.call("Hello")
    run_until(host.loop, lambda: len(host.answers) == 2)
    assert host.lost == []


def test_a_reset_that_is_seen_by_writing_is_one(host: Host) -> None:
    host.listen()
    host.call("Hello")
    run_until(host.loop, lambda: len(host.answers) == 1)
    host.answers[0](HelloResponse())
    host.call("Hello")
    run_until(host.loop, lambda: len(host.answers) == 2)
    host.far.close()  # with an answer unread
    host.answers[1](HelloResponse())  # EPIPE, and ECONNRESET kept as the socket's error
    assert host.resets == 1
    host.accept()
    assert host.lost == []


def test_a_clean_end_is_the_end(host: Host) -> None:
    host.listen()
    host.far.close()
    run_until(host.loop, lambda: bool(host.lost))
    assert host.lost == ["the host closed the control connection"]
    assert (host.resets, host.dialled) == (0, 0)


def test_a_host_that_breaks_the_protocol_is_the_end(host: Host) -> None:
    host.listen()
    host.far.sendall(b"\0\0\0\0\0\0\0\2\1\0")
    run_until(host.loop, lambda: bool(host.lost))
    assert host.lost[0].startswith("the host broke the control protocol")
    assert (host.resets, host.dialled) == (0, 0)


def test_closing_ends_the_dialling(host: Host) -> None:
    host.reset()
    run_until(host.loop, lambda: host.dialled > 1)
    host.connection.close()
    host.connection.close()
    dialled = host.dialled
    host.loop.call_later(0.1, host.loop.stop)
    host.loop.run()
    assert (host.dialled, host.lost) == (dialled, [])
