"""The ttrpc server and client of the shim, against each other and against a broken peer."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shim_harness import DEADLINE_S

from vmcell_protos.errors import CallerError, VmcellError
from vmcell_protos.task import ConnectRequest, ConnectResponse
from vmcell_protos.ttrpc import MAX_DATA_BYTES, REQUEST, encode_frame
from vmcell_shim.client import ConnectionLost, TtrpcClient
from vmcell_shim.journal import Journal
from vmcell_shim.server import TtrpcServer

Handler = Callable[[str, str, bytes, int], bytes]


class Bug(Exception):
    """Nothing the server knows."""


@contextmanager
def serving(directory: Path, handler: Handler) -> Iterator[str]:
    """The path of a server's socket."""
    path = str(directory / "server.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = TtrpcServer(listener, handler, Journal("", "test"))
    thread = threading.Thread(target=server.serve, args=(60.0, lambda: True))
    thread.start()
    try:
        yield path
    finally:
        server.stop()
        thread.join(DEADLINE_S)
        server.close(1.0)


@pytest.fixture
def open_client() -> Iterator[Callable[[str], TtrpcClient]]:
    clients: list[TtrpcClient] = []

    def connect(path: str) -> TtrpcClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        clients.append(TtrpcClient(sock, "the server"))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def ask(client: TtrpcClient, method: str, timeout_s: float = DEADLINE_S) -> ConnectResponse:
    return client.call("s", method, ConnectRequest(id=method), ConnectResponse, timeout_s)


def test_calls_run_side_by_side(tmp_path: Path, open_client: Callable[[str], TtrpcClient]) -> None:
    """A call that takes long holds up no other, on the same connection."""
    release = threading.Event()

    def handler(service: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        if method == "long":
            assert release.wait(DEADLINE_S)
        return ConnectResponse(version=method).encode()

    with serving(tmp_path, handler) as path:
        client = open_client(path)
        answers: list[str] = []
        long = threading.Thread(target=lambda: answers.append(ask(client, "long").version))
        long.start()
        for number in range(20):
            assert ask(client, f"short{number}").version == f"short{number}"
        assert answers == []
        release.set()
        long.join(DEADLINE_S)
        assert answers == ["long"]


def test_errors_and_bugs(
    tmp_path: Path,
    open_client: Callable[[str], TtrpcClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error keeps its code and words; a bug is `internal` for the caller, a traceback for us."""
    logged: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: logged.append(args.exc_type))

    def handler(service: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        if method == "refuse":
            raise CallerError("it is running", code="failed_precondition")
        raise Bug(method)

    with serving(tmp_path, handler) as path:
        client = open_client(path)
        with pytest.raises(VmcellError, match="it is running") as refused:
            ask(client, "refuse")
        assert refused.value.code == "failed_precondition"
        with pytest.raises(VmcellError) as broken:
            ask(client, "break")
        assert broken.value.code == "internal"
    assert logged == [Bug]


def test_no_descriptors_for_a_while_is_no_end(
    tmp_path: Path,
    open_client: Callable[[str], TtrpcClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = socket.socket.accept
    failures = iter([errno.EMFILE, errno.ENFILE])

    def scarce(listener: socket.socket) -> tuple[socket.socket, object]:
        if code := next(failures, 0):
            raise OSError(code, os.strerror(code))
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    with serving(tmp_path, lambda *_: b"") as path:
        ask(open_client(path), "echo")
    assert next(failures, 0) == 0


def test_peer_that_breaks_the_framing_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path, lambda *_: b"") as path, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(path)
        sock.sendall(encode_frame(2, REQUEST, b""))
        assert sock.recv(100) == b""


def test_timeout_and_late_answer(tmp_path: Path, open_client: Callable[[str], TtrpcClient]) -> None:
    release = threading.Event()

    def handler(service: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        if method == "late":
            assert timeout_ns == 50_000_000
            assert release.wait(DEADLINE_S)
        return ConnectResponse(version=method).encode()

    with serving(tmp_path, handler) as path:
        client = open_client(path)
        with pytest.raises(VmcellError) as caught:
            ask(client, "late", 0.05)
        assert caught.value.code == "deadline_exceeded"
        release.set()
        assert ask(client, "next").version == "next"


HOSTILE = {
    "a length of 4 GiB": b"\xff" * 10 + bytes(100),
    "a reply to nobody": encode_frame(99, 2, b""),
    "no message": encode_frame(1, 2, b"\xff\xff"),
    "half a frame": encode_frame(1, 2, bytes(1000))[:500],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_server_only_ends_the_call(name: str) -> None:
    """Whatever a guest's agent answers: an error for the call, nothing held, nothing hangs."""
    ours, theirs = socket.socketpair()
    lost = threading.Event()
    client = TtrpcClient(ours, "the agent", lost.set)

    def answer() -> None:
        theirs.recv(1 << 16)
        theirs.sendall(HOSTILE[name])
        theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(VmcellError):
        ask(client, "Hello")
    thread.join(DEADLINE_S)
    assert lost.wait(DEADLINE_S)
    with pytest.raises(ConnectionLost):
        ask(client, "Again")
    client.close()


def test_request_over_the_limit_is_refused_here() -> None:
    ours, theirs = socket.socketpair()
    client = TtrpcClient(ours, "the agent")
    request = ConnectRequest(id="x" * (MAX_DATA_BYTES + 1))
    with pytest.raises(VmcellError) as caught:
        client.call("s", "m", request, ConnectResponse, 1.0)
    assert caught.value.code == "resource_exhausted"
    client.close()
    theirs.close()


def test_idle_server_asks_and_ends(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "idle.sock"))
    listener.listen()
    asked: list[int] = []

    def still_needed() -> bool:
        asked.append(1)
        return len(asked) < 3

    server = TtrpcServer(listener, lambda *_: b"", Journal("", "test"))
    server.serve(0.01, still_needed)
    server.close()
    assert len(asked) == 3
    assert os.path.exists(tmp_path / "idle.sock")
