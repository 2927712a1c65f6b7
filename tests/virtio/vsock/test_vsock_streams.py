"""Streams between a guest that speaks packets and real host sockets: begin, bytes, end."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time

import pytest
from guest_driver import GuestDriver, Plug
from guest_vsock import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    NO_RECEIVE,
    NO_SEND,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    GuestVsock,
    Packet,
)
from turning_loop import TurningLoop
from vsock_host import GUEST_PORT, PORT, Host, Join, at_end, data_of, drain, ops_of

from vmcell_protos.errors import GuestError, HostError
from vmcell_runtime.virtio.vsock import device as vsock_device
from vmcell_runtime.virtio.vsock.connection import BUFFER_BYTES
from vmcell_runtime.virtio.vsock.device import Vsock
from vmcell_runtime.virtio.vsock.mux import MAX_STREAMS


class TestConnecting:
    def test_guest_dials_a_port_the_host_offers(self, guest: GuestVsock, host: Host) -> None:
        ours = host.listen()
        guest.send(REQUEST, PORT, GUEST_PORT)
        [packet] = guest.receive()
        assert packet == Packet(PORT, GUEST_PORT, RESPONSE, 0, BUFFER_BYTES, 0, b"")
        guest.send(RW, PORT, GUEST_PORT, b"hello")
        assert drain(ours) == b"hello"

    def test_each_offered_socket_is_one_connection(self, guest: GuestVsock, host: Host) -> None:
        first, second = host.listen(), host.listen()
        for guest_port in (1, 2, 3):
            guest.send(REQUEST, PORT, guest_port)
        assert ops_of(guest.receive()) == [RESPONSE, RESPONSE, RST]
        guest.send(RW, PORT, 2, b"two")
        guest.send(RW, PORT, 1, b"one")
        assert (drain(first), drain(second)) == (b"one", b"two")

    def test_port_nobody_offers_is_refused(self, guest: GuestVsock) -> None:
        guest.send(REQUEST, 9, GUEST_PORT)
        assert ops_of(guest.receive()) == [RST]

    def test_what_the_host_wrote_before_waits(self, guest: GuestVsock, host: Host) -> None:
        ours = host.listen()
        ours.send(b"early")
        guest.send(REQUEST, PORT, GUEST_PORT)
        packets = guest.receive_all()
        assert ops_of(packets) == [RESPONSE, RW]
        assert data_of(packets) == b"early"

    def test_host_dials_and_the_guest_accepts(self, guest: GuestVsock, host: Host) -> None:
        ours = host.connect(1025)
        ours.send(b"12345678")
        [request] = guest.receive()
        assert (request.op, request.guest_port) == (REQUEST, 1025)
        assert host.results == []
        guest.send(RESPONSE, request.host_port, 1025)
        host.settle()
        assert host.results == [None]
        assert data_of(guest.receive()) == b"12345678"

    def test_host_dials_and_the_guest_refuses(self, guest: GuestVsock, host: Host) -> None:
        ours = host.connect(1025)
        [request] = guest.receive()
        guest.send(RST, request.host_port, 1025)
        host.settle()
        [error] = host.results
        assert isinstance(error, GuestError)
        assert error.code == "unavailable"
        assert at_end(ours)

    def test_guest_that_never_answers(
        self, guest: GuestVsock, host: Host, loop: TurningLoop
    ) -> None:
        ours = host.connect(1025, timeout_ns=1_000_000)
        loop.advance_to_timers()
        [error] = host.results
        assert isinstance(error, HostError)
        assert error.code == "deadline_exceeded"
        assert at_end(ours)
        assert ops_of(guest.receive()) == [REQUEST, RST]

    def test_no_driver_yet(self, device: Vsock, plug: Plug) -> None:
        driver = plug(device)
        host = Host(device, driver)
        ours = host.connect()
        [error] = host.results
        assert isinstance(error, HostError)
        assert at_end(ours)
        ours.close()

    def test_streams_dialled_to_one_port_differ(self, guest: GuestVsock, host: Host) -> None:
        for _ in range(3):
            host.connect(1025)
        assert len({packet.host_port for packet in guest.receive()}) == 3

    def test_at_most_256_streams(self, guest: GuestVsock, host: Host) -> None:
        for guest_port in range(MAX_STREAMS):
            host.listen()
            guest.send(REQUEST, PORT, guest_port)
            assert ops_of(guest.receive()) == [RESPONSE]
        host.listen()
        guest.send(REQUEST, PORT, MAX_STREAMS)
        assert ops_of(guest.receive()) == [RST]
        host.connect()
        [error] = host.results
        assert error is not None
        assert error.code == "resource_exhausted"
        guest.send(RST, PORT, 0)
        guest.send(REQUEST, PORT, MAX_STREAMS)
        assert ops_of(guest.receive()) == [RESPONSE]


class TestData:
    @pytest.mark.parametrize("buffer_bytes", [45, 100, 3776, 44 + 65536])
    def test_100_chunks_to_the_guest_arrive_whole(
        self, driver: GuestDriver, host: Host, buffer_bytes: int
    ) -> None:
        guest = GuestVsock(driver, buffers=16, buffer_bytes=buffer_bytes)
        ours = host.listen()
        guest.send(REQUEST, PORT, GUEST_PORT)
        assert ops_of(guest.receive()) == [RESPONSE]
        data = random.Random(1).randbytes(100 * buffer_bytes)
        sent, got = 0, b""
        while len(got) < len(data):
            if sent < len(data):
                with contextlib.suppress(BlockingIOError):
                    sent += ours.send(data[sent : sent + 100_000])
            host.settle()
            packets = guest.receive_all()
            got += data_of(packets)
            guest.send(CREDIT_UPDATE, PORT, GUEST_PORT)
        assert got == data

    def test_4_mib_to_the_host_arrive_whole(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        ours = join()
        data = random.Random(2).randbytes(4 << 20)
        got = b""
        for start in range(0, len(data), 65536):
            guest.send(RW, PORT, GUEST_PORT, data[start : start + 65536])
            got += drain(ours)
            guest.receive()
        assert got == data

    def test_host_that_takes_nothing_is_withheld_credit(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        ours = join()
        sent = forwarded = 0
        while sent - forwarded + 65536 <= BUFFER_BYTES:
            guest.send(RW, PORT, GUEST_PORT, os.urandom(65536))
            sent += 65536
            for packet in guest.receive():
                assert packet.op == CREDIT_UPDATE
                forwarded = packet.fwd_cnt
        assert sent < 4 << 20  # the socket's own buffer and ours, no more
        other = host.listen()
        guest.send(REQUEST, PORT, 2)
        guest.send(RW, PORT, 2, b"not blocked")
        assert drain(other) == b"not blocked"
        got = 0
        while got < sent:
            got += len(drain(ours))
            host.settle()
        updates = [packet for packet in guest.receive() if packet.guest_port == GUEST_PORT]
        assert updates[-1].op == CREDIT_UPDATE
        assert updates[-1].fwd_cnt >= sent - BUFFER_BYTES // 2

    def test_guest_beyond_its_credit_is_cut_off(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        join()
        for _ in range(64):
            guest.send(RW, PORT, GUEST_PORT, bytes(65536))
        assert RST in ops_of(guest.receive())
        assert not guest.driver.needs_reset

    def test_guest_credit_is_kept(self, guest: GuestVsock, host: Host) -> None:
        ours = host.listen()
        guest.send(REQUEST, PORT, GUEST_PORT, buf_alloc=1000)
        ours.send(bytes(5000))
        host.settle()
        packets = guest.receive_all()
        assert ops_of(packets) == [RESPONSE, RW, CREDIT_REQUEST]
        assert len(data_of(packets)) == 1000
        guest.send(CREDIT_UPDATE, PORT, GUEST_PORT, buf_alloc=1000)
        assert len(data_of(guest.receive())) == 1000

    def test_credit_is_told_when_asked(self, guest: GuestVsock, join: Join) -> None:
        ours = join()
        guest.send(RW, PORT, GUEST_PORT, b"abc")
        guest.send(CREDIT_REQUEST, PORT, GUEST_PORT)
        [packet] = guest.receive()
        assert (packet.op, packet.fwd_cnt, packet.buf_alloc) == (CREDIT_UPDATE, 3, BUFFER_BYTES)
        assert drain(ours) == b"abc"

    def test_without_receive_buffers_the_host_waits(self, driver: GuestDriver, host: Host) -> None:
        guest = GuestVsock(driver, buffers=1, buffer_bytes=44 + 10)
        first, second = host.listen(), host.listen()
        guest.send(REQUEST, PORT, 1)
        guest.receive()
        guest.send(REQUEST, PORT, 2)
        guest.receive()
        first.send(b"a" * 25)
        second.send(b"b" * 25)
        host.settle()
        packets = guest.receive_all()
        for guest_port, letter in ((1, b"a"), (2, b"b")):
            mine = [packet for packet in packets if packet.guest_port == guest_port]
            assert data_of(mine) == letter * 25


class TestEnding:
    def test_host_half_closes(self, guest: GuestVsock, host: Host, join: Join) -> None:
        ours = join()
        ours.send(b"last")
        ours.shutdown(socket.SHUT_WR)
        host.settle()
        packets = guest.receive_all()
        assert [(p.op, p.flags) for p in packets] == [(RW, 0), (SHUTDOWN, NO_SEND)]
        guest.send(RW, PORT, GUEST_PORT, b"still here")
        assert drain(ours) == b"still here"
        guest.send(SHUTDOWN, PORT, GUEST_PORT, flags=NO_SEND | NO_RECEIVE)
        assert ops_of(guest.receive()) == [RST]
        assert at_end(ours)

    def test_guest_half_closes(self, guest: GuestVsock, host: Host, join: Join) -> None:
        ours = join()
        guest.send(RW, PORT, GUEST_PORT, b"last")
        guest.send(SHUTDOWN, PORT, GUEST_PORT, flags=NO_SEND)
        assert ours.recv(100) == b"last"
        assert at_end(ours)
        ours.send(b"answer")
        host.settle()
        assert data_of(guest.receive()) == b"answer"
        ours.shutdown(socket.SHUT_WR)
        host.settle()
        [packet] = guest.receive()
        assert (packet.op, packet.flags) == (SHUTDOWN, NO_SEND | NO_RECEIVE)
        guest.send(RST, PORT, GUEST_PORT)
        assert guest.receive() == []

    @pytest.mark.parametrize("ending", ["shutdown", "reset"])
    def test_nothing_the_guest_sent_is_lost_when_it_ends(
        self, guest: GuestVsock, host: Host, join: Join, ending: str
    ) -> None:
        ours = join()
        data = os.urandom(BUFFER_BYTES + 65536)  # more than the socket buffer takes
        sent = 0
        while sent < len(data):
            guest.send(RW, PORT, GUEST_PORT, data[sent : sent + 32768])
            sent += 32768
        if ending == "shutdown":
            guest.send(SHUTDOWN, PORT, GUEST_PORT, flags=NO_SEND | NO_RECEIVE)
            assert RST in ops_of(guest.receive())
        else:
            guest.send(RST, PORT, GUEST_PORT)
        got = b""
        while True:
            try:
                piece = ours.recv(50_000)
            except BlockingIOError:
                host.settle()
                continue
            if not piece:
                break
            got += piece
        assert got == data

    def test_nothing_the_host_sent_is_lost_when_it_closes(
        self, driver: GuestDriver, host: Host
    ) -> None:
        guest = GuestVsock(driver, buffers=4)
        ours = host.listen()
        guest.send(REQUEST, PORT, GUEST_PORT)
        guest.receive()
        data = os.urandom(100_000)
        ours.send(data)
        ours.close()
        host.settle()
        packets = guest.receive_all()
        assert data_of(packets) == data
        ends = [packet for packet in packets if packet.op == SHUTDOWN]
        assert ends[-1].flags == NO_SEND | NO_RECEIVE
        assert packets.index(ends[-1]) == len(packets) - 1

    def test_host_end_closed_with_bytes_unread_still_ends_cleanly_for_the_guest(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        ours = join()
        guest.send(RW, PORT, GUEST_PORT, b"never read")
        ours.close()
        host.settle()
        last = guest.receive()[-1]
        assert (last.op, last.flags) == (SHUTDOWN, NO_SEND | NO_RECEIVE)
        guest.send(RW, PORT, GUEST_PORT, b"into the void")
        guest.send(RST, PORT, GUEST_PORT)
        assert not guest.driver.needs_reset

    def test_host_that_stops_reading_is_told_to_the_guest(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        ours = join()
        ours.shutdown(socket.SHUT_RD)
        guest.send(RW, PORT, GUEST_PORT, b"x")
        [packet] = guest.receive()
        assert (packet.op, packet.flags) == (SHUTDOWN, NO_RECEIVE)
        ours.send(b"y")
        host.settle()
        assert data_of(guest.receive()) == b"y"

    def test_guest_that_stops_reading_is_told_to_the_host(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        ours = join()
        guest.send(SHUTDOWN, PORT, GUEST_PORT, flags=NO_RECEIVE)
        with pytest.raises(BrokenPipeError):
            ours.send(b"x")
        guest.send(RW, PORT, GUEST_PORT, b"z")
        assert drain(ours) == b"z"

    def test_host_that_had_half_closed_and_then_goes(
        self, guest: GuestVsock, host: Host, join: Join
    ) -> None:
        ours = join()
        ours.shutdown(socket.SHUT_WR)
        host.settle()
        assert ops_of(guest.receive()) == [SHUTDOWN]
        ours.close()
        host.settle()
        [packet] = guest.receive()
        assert (packet.op, packet.flags) == (SHUTDOWN, NO_SEND | NO_RECEIVE)

    def test_ended_stream_does_not_keep_the_loop_busy(
        self, guest: GuestVsock, host: Host, join: Join, loop: TurningLoop
    ) -> None:
        ours = join()
        ours.close()
        host.settle()
        assert not loop.turn()


class TestMachineEnd:
    def test_what_the_guest_sent_last_still_arrives(
        self, guest: GuestVsock, host: Host, join: Join, driver: GuestDriver
    ) -> None:
        """The guest is gone before the loop saw its last notification."""
        ours = join()
        data = os.urandom(BUFFER_BYTES)
        guest.tx.next_buffer_gpa = guest.tx.buffers_gpa
        for start in range(0, len(data), 65536):
            guest.offer(RW, PORT, GUEST_PORT, data[start : start + 65536])
        got: list[bytes] = []

        def read_to_the_end() -> None:
            ours.settimeout(10)
            while piece := ours.recv(10_000):
                got.append(piece)

        reader = threading.Thread(target=read_to_the_end)
        reader.start()
        driver.transport.close()
        reader.join(10)
        assert b"".join(got) == data

    def test_host_that_takes_nothing_does_not_hold_up_the_end(
        self,
        guest: GuestVsock,
        join: Join,
        driver: GuestDriver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(vsock_device, "LAST_FLUSH_NS", 50_000_000)
        ours = join()
        for _ in range(6):
            guest.send(RW, PORT, GUEST_PORT, bytes(65536))
        start = time.monotonic()
        driver.transport.close()
        assert time.monotonic() - start < 5
        assert drain(ours)
        assert at_end(ours)
