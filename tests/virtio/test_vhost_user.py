"""The front-end against back-ends that answer well, badly, late or never."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from fake_back_end import (
    ACK,
    RING_FEATURES,
    STEPS_OF_TWO_QUEUES,
    FakeBackEnd,
    answer,
    negotiation,
    started,
    stopped,
)
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import vhost_user
from vmcell_runtime.virtio.queue import RingLayout
from vmcell_runtime.virtio.vhost_user import FrontEnd, Ring

LAYOUTS = [RingLayout(8, 0x1000 * n, 0x1000 * n + 0x400, 0x1000 * n + 0x800) for n in (1, 2)]


@pytest.fixture
def back_end() -> Iterator[FakeBackEnd]:
    back_end = FakeBackEnd()
    yield back_end
    back_end.close()


@pytest.fixture
def front_end(back_end: FakeBackEnd) -> Iterator[FrontEnd]:
    front_end = FrontEnd(back_end.front)
    yield front_end
    front_end.close()


@pytest.fixture
def shared() -> Iterator[GuestMemory]:
    memory = GuestMemory(8 << 20, shared=True)
    yield memory
    memory.close()


@pytest.fixture
def rings() -> Iterator[list[Ring]]:
    fds = [os.eventfd(0) for _ in range(3)]
    yield [Ring(layout, fd, fds[2]) for layout, fd in zip(LAYOUTS, fds, strict=False)]
    for fd in fds:
        os.close(fd)


def same_file(one: int, other: int) -> bool:
    return os.readlink(f"/proc/self/fd/{one}") == os.readlink(f"/proc/self/fd/{other}")


def test_memory_and_queues_are_handed_over_in_order(
    back_end: FakeBackEnd, front_end: FrontEnd, shared: GuestMemory, rings: list[Ring]
) -> None:
    back_end.say(negotiation() + started())
    front_end.negotiate()
    assert front_end.features == RING_FEATURES
    assert [got.request for got in back_end.heard()] == [1, 15, 16, 3]
    front_end.start(1 << 32 | 1 << 28 | 1 << 5, shared.shared_regions(), rings)
    got = back_end.heard()
    assert [message.request for message in got] == STEPS_OF_TWO_QUEUES
    assert all(message.flags == 9 for message in got), "each step is acknowledged"
    features, table, calls, kicks = got[0], got[1], got[5], got[6]
    assert struct.unpack("<Q", features.payload) == (1 << 32 | 1 << 30 | 1 << 28,)
    (region,) = shared.shared_regions()
    rows = struct.unpack("<IIQQQQ", table.payload)
    assert rows == (1, 0, 0, 8 << 20, 0, region.offset)
    shared.write(0x1234, b"seen by both")
    assert os.pread(table.fds[0], 12, region.offset + 0x1234) == b"seen by both"
    os.eventfd_write(rings[0].call_fd, 3)
    assert os.eventfd_read(calls.fds[0]) == 3
    os.eventfd_write(rings[0].kick_fd, 4)
    assert os.eventfd_read(kicks.fds[0]) == 4
    assert len(back_end.fds) == 5, "one for memory, two for each queue"


def test_stopping_waits_for_each_queue(back_end: FakeBackEnd, front_end: FrontEnd) -> None:
    back_end.say(stopped())
    front_end.stop(2)
    got = back_end.heard()
    assert [(message.request, message.payload[0]) for message in got] == [(11, 0), (11, 1)]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (answer(1, RING_FEATURES & ~(1 << 30)), "knows no protocol features"),
        (answer(1, RING_FEATURES) + answer(15, 0), "cannot acknowledge"),
        (answer(1, RING_FEATURES) + answer(15, ACK) + answer(3, 22), "refused request 3 with 22"),
        (answer(15, RING_FEATURES), "answered request 1 with request 15"),
        (answer(1, RING_FEATURES, flags=1), "answered request 1 with request 1, flags 0x1"),
        (answer(1, b"short"), "answered request 1 with 5 bytes"),
    ],
)
def test_a_bad_answer_loses_the_back_end(
    back_end: FakeBackEnd, front_end: FrontEnd, said: bytes, sentence: str
) -> None:
    back_end.say(said)
    with pytest.raises(HostError, match=sentence):
        front_end.negotiate()
    assert sentence in front_end.lost
    with pytest.raises(HostError, match=sentence):
        front_end.stop(1)
    back_end.heard()
    assert back_end.end.recv(1) == b"", "it learns that it was given up"


def test_stopping_another_queue_loses_it(back_end: FakeBackEnd, front_end: FrontEnd) -> None:
    back_end.say(answer(11, struct.pack("<II", 1, 0)))
    with pytest.raises(HostError, match="a queue that is not 0"):
        front_end.stop(2)


@pytest.mark.parametrize("said", [b"", answer(1, 0)[:3], answer(1, 0)[:15]])
def test_silence_ends_at_the_deadline(
    back_end: FakeBackEnd, front_end: FrontEnd, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vhost_user, "ANSWER_TIMEOUT_S", 0.2)
    back_end.say(said)
    begin = time.monotonic()
    with pytest.raises(HostError, match=r"did not answer request 1 within 0\.2 s") as raised:
        front_end.negotiate()
    assert raised.value.code == "deadline_exceeded"
    assert 0.15 < time.monotonic() - begin < 5


def test_a_back_end_that_reads_nothing_is_lost(
    back_end: FakeBackEnd, front_end: FrontEnd, shared: GuestMemory, rings: list[Ring]
) -> None:
    back_end.front.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def start_for_ever() -> None:
        for _ in range(1000):
            back_end.say(started())
            front_end.start(0, shared.shared_regions(), rings)

    with pytest.raises(HostError, match="takes no request"):
        start_for_ever()


@pytest.mark.parametrize("said", [b"", answer(1, 0)[:13]])
def test_a_back_end_that_is_gone_is_said_to_be(
    back_end: FakeBackEnd, front_end: FrontEnd, said: bytes
) -> None:
    back_end.say(said)
    back_end.end.close()
    with pytest.raises(HostError, match=r"gone|closed its connection"):
        front_end.negotiate()


@given(st.binary(max_size=80))
def test_noise_is_an_error_or_an_answer(said: bytes) -> None:
    back_end = FakeBackEnd()
    front_end = FrontEnd(back_end.front)
    back_end.say(said)
    back_end.end.shutdown(socket.SHUT_WR)
    try:
        front_end.ask_features()
    except HostError:
        assert front_end.lost
    finally:
        front_end.close()
        back_end.close()


def test_descriptors_nobody_asked_for_are_dropped(
    back_end: FakeBackEnd, front_end: FrontEnd
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(back_end.end, [answer(1, 5)], [0, 0, 0])
    assert front_end.ask_features() == 5
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_a_unix_stream_will_do() -> None:
    for kind in (
        socket.socket(socket.AF_INET),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ):
        with kind, pytest.raises(CallerError, match="unix stream socket"):
            FrontEnd(kind)
