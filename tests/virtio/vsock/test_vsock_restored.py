"""A socket device taken over from another process: its streams are gone, and the guest is told."""

from __future__ import annotations

import pytest
from guest_driver import GuestDriver, Plug
from guest_vsock import GUEST_CID, REQUEST, RESPONSE, RST, RW, GuestVsock
from turning_loop import TurningLoop
from vsock_host import GUEST_PORT, PORT, Host, Join

from vmcell_protos.errors import CallerError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.vsock.device import Vsock

TRANSPORT_RESET = bytes(4)


def successor_of(
    driver: GuestDriver, plug: Plug, memory: GuestMemory, loop: TurningLoop
) -> GuestDriver:
    """What stands at the guest's window after a restore, with the same rings."""
    new = plug(Vsock(memory, loop, GUEST_CID))
    new.transport.load(driver.transport.save())
    new.queues = driver.queues
    # The one that was saved works in the same memory here; it must not.
    driver.transport.close()
    return new


def test_the_guest_is_told_once_that_its_streams_are_gone(
    driver: GuestDriver,
    guest: GuestVsock,
    join: Join,
    plug: Plug,
    memory: GuestMemory,
    loop: TurningLoop,
) -> None:
    end = join()
    for _ in range(4):
        driver.queues[2].offer(writable=[8])
    driver.kick(2)
    new = successor_of(driver, plug, memory, loop)
    loop.settle()
    [(buffer, written)] = new.queues[2].collect()
    assert new.queues[2].contents(buffer)[:written] == TRANSPORT_RESET
    assert new.irq.count
    assert new.get(0x60) & 1
    again = successor_of(new, plug, memory, loop)
    loop.settle()
    assert len(again.queues[2].collect()) == 1, "once for each restore"
    # What the guest still sends on the old stream is answered by a reset.
    guest.driver = again
    guest.send(RW, PORT, GUEST_PORT, b"late")
    [packet] = guest.receive()
    assert (packet.op, packet.host_port, packet.guest_port) == (RST, PORT, GUEST_PORT)
    end.close()


def test_without_a_buffer_for_events_it_is_not_told(
    driver: GuestDriver, plug: Plug, memory: GuestMemory, loop: TurningLoop
) -> None:
    new = successor_of(driver, plug, memory, loop)
    loop.settle()
    assert not new.needs_reset
    assert new.queues[2].collect() == []


def test_new_streams_work_both_ways(
    driver: GuestDriver, guest: GuestVsock, plug: Plug, memory: GuestMemory, loop: TurningLoop
) -> None:
    """Also with the receive buffers that the other device had taken and not used."""
    new = successor_of(driver, plug, memory, loop)
    guest.driver = new
    assert isinstance(new.device, Vsock)
    host = Host(new.device, new)
    end = host.listen()
    guest.send(REQUEST, PORT, GUEST_PORT + 1)
    assert [packet.op for packet in guest.receive()] == [RESPONSE]
    guest.send(RW, PORT, GUEST_PORT + 1, b"from the guest")
    assert end.recv(100) == b"from the guest"
    end.send(b"to the guest")
    host.settle()
    assert b"".join(packet.data for packet in guest.receive()) == b"to the guest"
    dialled = host.connect()
    [request] = guest.receive()
    assert request.op == REQUEST
    guest.send(RESPONSE, request.host_port, request.guest_port)
    host.settle()
    assert host.results == [None]
    for socket in (end, dialled):
        socket.close()


def test_buffers_taken_for_a_stream_that_had_nothing_to_say_come_back(
    driver: GuestDriver,
    guest: GuestVsock,
    join: Join,
    plug: Plug,
    memory: GuestMemory,
    loop: TurningLoop,
) -> None:
    end = join()
    end.send(b"x" * 100)
    loop.settle()
    assert [packet.data for packet in guest.receive()] == [b"x" * 100]
    taken, given = driver.transport.save().queues[0][-2:]
    assert taken == given, "the spare ones count as not taken"
    new = successor_of(driver, plug, memory, loop)
    guest.driver = new
    assert isinstance(new.device, Vsock)
    host = Host(new.device, new)
    after = host.listen(PORT + 1)
    guest.send(REQUEST, PORT + 1, GUEST_PORT)
    after.send(b"y" * 100_000)
    host.settle()
    received = b""
    while packets := guest.receive():
        received += b"".join(packet.data for packet in packets)
    assert received == b"y" * 100_000
    after.close()
    end.close()


def test_another_cid_is_refused(
    driver: GuestDriver, plug: Plug, memory: GuestMemory, loop: TurningLoop
) -> None:
    with pytest.raises(CallerError, match="configuration"):
        plug(Vsock(memory, loop, GUEST_CID + 1)).transport.load(driver.transport.save())
