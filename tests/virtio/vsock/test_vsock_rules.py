"""What a guest can get wrong on the socket device, and what becomes of it."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket

import pytest
from fake_memory import FlippingMemory
from guest_driver import GuestDriver, Plug
from guest_vsock import (
    BUF_ALLOC,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    GUEST_CID,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    GuestVsock,
)
from turning_loop import TurningLoop
from vsock_host import GUEST_PORT, PORT, Host, Join, at_end, drain, ops_of

from vmcell_protos.errors import HostError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.vsock.device import Vsock


class TestRules:
    def test_unknown_operation_resets_the_stream(self, guest: GuestVsock, join: Join) -> None:
        ours = join()
        guest.send(99, PORT, GUEST_PORT)
        assert ops_of(guest.receive()) == [RST]
        assert at_end(ours)

    @pytest.mark.parametrize("op", [REQUEST, RESPONSE, 0])
    def test_operation_out_of_place_resets_the_stream(
        self, guest: GuestVsock, join: Join, op: int
    ) -> None:
        join()
        guest.send(op, PORT, GUEST_PORT)
        assert ops_of(guest.receive()) == [RST]

    @pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 77])
    def test_packet_of_no_stream_is_answered_with_reset(self, guest: GuestVsock, op: int) -> None:
        guest.send(op, PORT, GUEST_PORT)
        assert ops_of(guest.receive()) == [RST]

    def test_reset_of_no_stream_is_not_answered(self, guest: GuestVsock) -> None:
        guest.send(RST, PORT, GUEST_PORT)
        assert guest.receive() == []

    def test_other_socket_types_are_refused(self, guest: GuestVsock, host: Host) -> None:
        host.listen()
        guest.send(REQUEST, PORT, GUEST_PORT, kind=2)
        assert ops_of(guest.receive()) == [RST]

    @pytest.mark.parametrize(
        ("source", "destination"), [(4, 2), (2, 2), (GUEST_CID, 1), (GUEST_CID, GUEST_CID)]
    )
    def test_foreign_addresses_are_dropped(
        self, guest: GuestVsock, host: Host, source: int, destination: int
    ) -> None:
        host.listen()
        guest.send(REQUEST, PORT, 1, source_cid=source, destination_cid=destination)
        assert guest.receive() == []
        guest.send(REQUEST, PORT, 1)
        assert ops_of(guest.receive()) == [RESPONSE]

    @pytest.mark.parametrize("length", [4, 65537, 0xFFFF_FFFF])
    def test_declared_length_beyond_the_packet_stops_the_device(
        self, guest: GuestVsock, join: Join, length: int
    ) -> None:
        ours = join()
        guest.send(RW, PORT, GUEST_PORT, b"abc", length=length)
        assert guest.driver.needs_reset
        assert at_end(ours)

    def test_header_cut_short_stops_the_device(self, guest: GuestVsock) -> None:
        guest.tx.offer([bytes(43)])
        guest.driver.kick(1)
        assert guest.driver.needs_reset

    def test_guest_that_takes_no_answers_gets_no_more_questions_in(
        self, driver: GuestDriver
    ) -> None:
        guest = GuestVsock(driver, buffers=0)
        questions = 0
        while guest.tx.free:
            guest.send(RW, 1, questions)
            questions += 1
        assert questions < 2000
        assert not driver.needs_reset
        answers = 0
        guest.fill(128)
        while packets := guest.receive():
            answers += len(packets)
            guest.tx.collect()
        assert answers == questions

    def test_reset_with_streams_in_flight(
        self, guest: GuestVsock, host: Host, join: Join, driver: GuestDriver
    ) -> None:
        ours = join()
        dialled = host.connect(1025)
        ours.send(b"in flight")
        driver.set(0x70, 0)
        driver.loop.settle()
        [error] = host.results
        assert isinstance(error, HostError)
        assert at_end(ours)
        assert at_end(dialled)
        driver.start()
        again = GuestVsock(driver)
        other = host.listen()
        again.send(REQUEST, PORT, GUEST_PORT)
        again.send(RW, PORT, GUEST_PORT, b"fresh")
        assert drain(other) == b"fresh"

    def test_headers_are_not_read_twice(
        self, flipping_memory: FlippingMemory, loop: TurningLoop, plug: Plug
    ) -> None:
        device = Vsock(flipping_memory, loop, GUEST_CID)
        driver = plug(device, ram=flipping_memory)
        driver.start()
        guest = GuestVsock(driver, buffers=0)
        ours, theirs = socket.socketpair()
        device.listen(PORT, theirs)
        flipping_memory.flip = True
        guest.tx.next_buffer_gpa = guest.tx.buffers_gpa
        for op, data in ((REQUEST, b""), (RW, b"payload")):
            gpa = guest.tx.next_buffer_gpa
            guest.send(op, PORT, GUEST_PORT, data)
            guest.tx.buffers_gpa = gpa + 4096
        flipping_memory.flip = False
        assert flipping_memory.second_reads == 0
        assert ours.recv(100) == b"payload"
        ours.close()


@pytest.mark.parametrize("seed", range(20))
def test_random_packets_never_break_more_than_the_device(
    seed: int, memory: GuestMemory, loop: TurningLoop, plug: Plug
) -> None:
    """Whatever a guest sends: no exception but GuestError, and the device starts again."""
    rng = random.Random(seed)
    device = Vsock(memory, loop, GUEST_CID)
    driver = plug(device)
    driver.start()
    guest = GuestVsock(driver, buffers=rng.choice([0, 1, 16]))
    host = Host(device, driver)
    ports = itertools.cycle(range(3))
    for _ in range(200):
        if rng.random() < 0.1:
            host.listen()
        if host.ends and rng.random() < 0.2:
            end = rng.choice(host.ends)
            with contextlib.suppress(OSError):
                rng.choice(
                    [lambda e: e.send(b"x" * 5000), lambda e: e.recv(9000), lambda e: e.close()]
                )(end)
        data = rng.randbytes(rng.choice([0, 1, 100, 5000]))
        guest.send(
            rng.choice(
                [REQUEST, RESPONSE, RST, SHUTDOWN, RW, RW, CREDIT_UPDATE, CREDIT_REQUEST, 9]
            ),
            PORT,
            next(ports),
            data,
            flags=rng.randrange(5),
            buf_alloc=rng.choice([0, 1, 1000, BUF_ALLOC, 2**32 - 1]),
            length=rng.choice([-1] * 50 + [len(data) + 1]),
        )
        if rng.random() < 0.5:
            guest.receive(refill=rng.random() < 0.8)
        if driver.needs_reset:
            driver.start()
            guest = GuestVsock(driver, buffers=4)
    for end in host.ends:
        end.close()
    loop.settle()
