"""The network device on a real TAP in a network namespace of its own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest
from guest_driver import GuestDriver, Plug
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import host_abi
from vmcell_runtime.virtio.net import Net

pytestmark = pytest.mark.root

NAMESPACE = "vmcell-test-tap"
MAC = bytes.fromhex("02c0ffee0001")
HOST, GUEST = "192.0.2.1", "192.0.2.2"
HEADER = bytes(12)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)


@pytest.fixture
def tap_fd() -> Iterator[int]:
    """A TAP named tap0 in a fresh namespace; the test runs in that namespace."""
    subprocess.run(["ip", "netns", "delete", NAMESPACE], check=False, capture_output=True)
    _ip("netns", "add", NAMESPACE)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    away = os.open(f"/run/netns/{NAMESPACE}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(away, 0) == 0
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = host_abi.IFF_TAP | host_abi.IFF_NO_PI | host_abi.IFF_VNET_HDR
        fcntl.ioctl(fd, host_abi.TUNSETIFF, host_abi.IFREQ.pack(b"tap0", flags))
        _ip("address", "add", f"{HOST}/30", "dev", "tap0")
        _ip("link", "set", "tap0", "up")
        _ip("neighbour", "add", GUEST, "lladdr", MAC.hex(":"), "dev", "tap0")
        yield fd
    finally:
        assert libc.setns(home, 0) == 0
        os.close(home)
        os.close(away)
        _ip("netns", "delete", NAMESPACE)


def test_datagrams_both_ways(
    memory: GuestMemory, loop: TurningLoop, plug: Plug, tap_fd: int
) -> None:
    """A UDP datagram of a host program reaches the guest, and the guest's answer the program."""
    driver = plug(Net(memory, loop, tap_fd, mac=MAC, mtu=1500))
    driver.start()
    receive, transmit = driver.queues
    for _ in range(64):
        receive.offer(writable=[1536])
    driver.kick(0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
        program.bind((HOST, 0))
        program.settimeout(10)
        program.sendto(b"question", (GUEST, 7))
        frame = _wait_for_udp(driver, b"question")
        header, ethernet, ip, udp = frame[:12], frame[12:26], frame[26:46], frame[46:54]
        assert ethernet[:6] == MAC
        source_port, guest_port = struct.unpack_from(">HH", udp)
        answer = b"answer"
        ip = _ip_header(ip[16:20], ip[12:16], 28 + len(answer))
        udp = struct.pack(">HHHH", guest_port, source_port, 8 + len(answer), 0)
        transmit.offer([HEADER + ethernet[6:12] + MAC + b"\x08\x00" + ip + udp + answer])
        driver.kick(1)
        assert program.recv(100) == answer
        assert len(header) == 12


def _wait_for_udp(driver: GuestDriver, payload: bytes) -> bytes:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        driver.loop.settle()
        queue = driver.queues[0]
        for buffer, written in queue.collect():
            frame: bytes = queue.contents(buffer)[:written]
            if frame.endswith(payload):
                return frame
    raise AssertionError(f"no frame with {payload!r} within 10 s")


def _ip_header(source: bytes, destination: bytes, length: int) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, length, 1, 0, 64, 17, 0) + source + destination
    total = sum(struct.unpack(">10H", head))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:]
