"""Two sockets joined: bytes, ends and failures, with the far ends in the test's hands."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from vmcell_shim import relay as relay_module
from vmcell_shim.relay import relay

MIB = 1 << 20


class Joined:
    """left <-> relay <-> right; `left` and `right` are the test's ends."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.left = socket.create_connection(listener.getsockname(), timeout=10)
        self._inner_left, _ = listener.accept()
        listener.close()
        self.right, self._inner_right = socket.socketpair()
        self.right.settimeout(10)
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._inner_left, self._inner_right:
            relay(self._inner_left, self._inner_right, self._stop)

    def ended(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        self.stop()
        assert self.ended()
        self.left.close()
        self.right.close()
        os.close(self._stop)


@pytest.fixture
def joined() -> Iterator[Joined]:
    pair = Joined()
    yield pair
    pair.close()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(MIB), b""))


def test_both_ways_at_once_and_half_closes(joined: Joined) -> None:
    """8 MiB each way, far more than the buffers hold; each end comes through on its own."""
    data = random.Random(3).randbytes(8 * MIB)

    def send(sock: socket.socket, what: bytes) -> None:
        sock.sendall(what)
        sock.shutdown(socket.SHUT_WR)

    senders = [
        threading.Thread(target=send, args=(joined.left, data)),
        threading.Thread(target=send, args=(joined.right, data[::-1])),
    ]
    for sender in senders:
        sender.start()
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_all(joined.left)))
    reader.start()
    assert read_all(joined.right) == data
    reader.join(30)
    assert got == [data[::-1]]
    for sender in senders:
        sender.join(10)
    assert joined.ended()


def test_an_answer_after_the_question_has_ended(joined: Joined) -> None:
    joined.left.sendall(b"question")
    joined.left.shutdown(socket.SHUT_WR)
    assert read_all(joined.right) == b"question"
    joined.right.sendall(b"late answer")
    joined.right.close()
    assert read_all(joined.left) == b"late answer"
    assert joined.ended()


def test_a_side_that_answers_and_closes_with_the_question_unread(joined: Joined) -> None:
    joined.right.sendall(b"too large")
    joined.right.close()
    assert joined.left.recv(100) == b"too large"
    assert joined.ended()


def test_a_refusal_ends_the_client_at_once(joined: Joined) -> None:
    """What the guest's agent does for a port where nobody listens."""
    joined.right.close()
    assert joined.left.recv(1) == b""
    assert joined.ended()


def test_a_reset_ends_the_other_side(joined: Joined) -> None:
    joined.left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    joined.left.close()
    assert read_all(joined.right) == b""
    assert joined.ended()


def test_a_slow_reader_costs_one_chunk(joined: Joined) -> None:
    """Nobody reads on the right: the left's writes stall instead of filling memory."""
    joined.left.settimeout(1)
    sent = 0
    with suppress(TimeoutError):
        while sent < 64 * MIB:
            sent += joined.left.send(bytes(MIB))
    assert sent < 64 * MIB


def test_stop_ends_an_idle_pair(joined: Joined) -> None:
    joined.stop()
    assert joined.ended()
    assert joined.left.recv(1) == b""
    assert joined.right.recv(1) == b""


def test_a_half_open_pair_that_is_silent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_HALF_OPEN_S", 0.2)
    pair = Joined()
    try:
        pair.left.shutdown(socket.SHUT_WR)
        assert pair.ended()
        assert pair.left.recv(1) == b""
    finally:
        pair.close()
