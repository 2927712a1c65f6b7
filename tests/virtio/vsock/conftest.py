"""A socket device with a guest that speaks packets and host programs with real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from guest_driver import GuestDriver, Plug
from guest_vsock import GUEST_CID, REQUEST, RESPONSE, GuestVsock
from turning_loop import TurningLoop
from vsock_host import GUEST_PORT, PORT, Host, Join

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.vsock.device import Vsock


@pytest.fixture
def device(memory: GuestMemory, loop: TurningLoop) -> Vsock:
    return Vsock(memory, loop, GUEST_CID)


@pytest.fixture
def driver(device: Vsock, plug: Plug) -> GuestDriver:
    driver = plug(device)
    driver.start()
    return driver


@pytest.fixture
def guest(driver: GuestDriver) -> GuestVsock:
    return GuestVsock(driver)


@pytest.fixture
def host(device: Vsock, driver: GuestDriver) -> Iterator[Host]:
    host = Host(device, driver)
    yield host
    for end in host.ends:
        end.close()


@pytest.fixture
def join(host: Host, guest: GuestVsock) -> Join:
    """A stream that the guest dialled and the host took."""

    def connect() -> socket.socket:
        ours = host.listen()
        guest.send(REQUEST, PORT, GUEST_PORT)
        [packet] = guest.receive()
        assert packet.op == RESPONSE
        return ours

    return connect
