"""Network namespaces as a CNI plugin leaves them, with a peer on the other end of each interface.

The peer is a real kernel's stack in a namespace of its own; the test plays the guest at the TAP.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from vmcell_shim.netns import in_namespace, open_namespace

T = TypeVar("T")

DEADLINE_S = 10.0
VNET_HEADER = bytes(12)
ARP, IPV4 = 0x0806, 0x0800
BROADCAST = b"\xff" * 6


def run(*command: str) -> str:
    """The command's standard output; raises with its error output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Namespace:
    """One named namespace (`ip netns`)."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def ip(self, text: str) -> str:
        return run("ip", "-n", self.name, *text.split())

    def shown(self, text: str) -> Any:
        return json.loads(run("ip", "-json", "-n", self.name, *text.split()))

    def links(self) -> set[str]:
        return {row["ifname"] for row in self.shown("link show")}

    def qdiscs(self, link: str) -> set[str]:
        return {row["kind"] for row in json.loads(self.tc(f"-json qdisc show dev {link}"))}

    def tc(self, text: str) -> str:
        return run("tc", "-n", self.name, *text.split())

    def inside(self, function: Callable[[], T]) -> T:
        fd = open_namespace(self.path)
        try:
            return in_namespace(fd, function)
        finally:
            os.close(fd)

    def joined_to(self, peer: Namespace, link: str, mac: str, *, mtu: int = 1500) -> None:
        """A veth `link`, up, whose other end is `to-<link>` of `peer`, up and with no IPv6."""
        far = f"to-{link}"
        self.ip(f"link add {link} address {mac} mtu {mtu} type veth peer {far} netns {peer.name}")
        peer.ip(f"link set {far} mtu {mtu} addrgenmode none up")
        self.ip(f"link set {link} addrgenmode none up")


@contextmanager
def namespaces(*names: str) -> Iterator[list[Namespace]]:
    """One fresh namespace a name, with its loopback up; those that are left are removed."""
    made = [Namespace(f"vmcell-{name}-{os.getpid()}") for name in names]
    try:
        for namespace in made:
            run("ip", "netns", "add", namespace.name)
            namespace.ip("link set lo up")
        yield made
    finally:
        for namespace in made:
            if os.path.exists(namespace.path):
                run("ip", "netns", "delete", namespace.name)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One Ethernet frame without the virtio header."""

    destination: bytes
    source: bytes
    kind: int
    payload: bytes


class GuestNic:
    """The guest's interface, played at the TAP's descriptor (which stays the caller's)."""

    def __init__(self, tap_fd: int, mac: str, address: str) -> None:
        self._fd = tap_fd
        self.mac = bytes.fromhex(mac.replace(":", ""))
        self.address = socket.inet_aton(address)

    def receive(self, wanted: Callable[[Frame], bool]) -> Frame:
        """The next frame that is wanted; others are passed over."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            poll.poll(1000)
            frame = self.take()
            if frame is not None and wanted(frame):
                return frame
        raise AssertionError(f"no such frame within {DEADLINE_S:g} s")

    def take(self) -> Frame | None:
        """A frame that is there already."""
        try:
            data = os.read(self._fd, 70_000)[len(VNET_HEADER) :]
        except BlockingIOError:
            return None
        kind = int.from_bytes(data[12:14], "big")
        return Frame(destination=data[:6], source=data[6:12], kind=kind, payload=data[14:])

    def send(self, destination: bytes, kind: int, payload: bytes) -> None:
        frame = destination + self.mac + kind.to_bytes(2, "big") + payload
        os.write(self._fd, VNET_HEADER + frame)

    def answer_arp(self) -> Frame:
        """Waits for a question after our address and answers it; the question."""
        asked = self.receive(lambda f: f.kind == ARP and f.payload[24:28] == self.address)
        head = struct.pack(">HHBBH", 1, IPV4, 6, 4, 2)
        self.send(asked.source, ARP, head + self.mac + self.address + asked.payload[8:18])
        return asked

    def ip_packet(self, protocol: int, *, source_port: int | None = None) -> Frame:
        """The next IPv4 packet of that protocol for us, from that port when one is given."""
        return self.receive(
            lambda f: (
                f.kind == IPV4
                and f.payload[9] == protocol
                and f.payload[16:20] == self.address
                and source_port in (None, int.from_bytes(f.payload[20:22], "big"))
            )
        )

    def answer_ip(self, question: Frame, body: bytes) -> None:
        """A packet back to where `question` came from, with `body` behind the IP header."""
        to, protocol = question.payload[12:16], question.payload[9]
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0x4000, 64, protocol, 0)
        head += self.address + to
        checksum = struct.pack(">H", internet_checksum(head))
        self.send(question.source, IPV4, head[:10] + checksum + head[12:] + body)


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
