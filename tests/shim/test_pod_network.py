"""TAPs joined to real interfaces of real namespaces; the test is the guest, a kernel the peer."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from pod_namespaces import ARP, BROADCAST, GuestNic, Namespace, internet_checksum, namespaces, run

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.config import NetConfig
from vmcell_shim import pod_network
from vmcell_shim.pod_network import PodNetwork, attach, detach

pytestmark = pytest.mark.root

MAC, MAC2 = "02:00:00:00:00:07", "02:00:00:00:00:08"
GUEST, PEER = "192.0.2.2", "192.0.2.1"
TCP, UDP = 6, 17


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    """(the pod's namespace, its peer's)."""
    with namespaces("pod", "peer") as (pod, peer):
        yield pod, peer


def link(pod: Namespace, peer: Namespace, *, mtu: int = 1500) -> None:
    pod.joined_to(peer, "eth0", MAC, mtu=mtu)
    pod.ip(f"address add {GUEST}/24 dev eth0")
    peer.ip(f"address add {PEER}/24 dev to-eth0")


def open_udp(peer: Namespace) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # Fragments would hide a frame that does not fit: IP_MTU_DISCOVER, IP_PMTUDISC_DO.
        sock.setsockopt(socket.IPPROTO_IP, 10, 2)
        sock.settimeout(10)
        return sock

    return peer.inside(make)


def udp_round_trip(peer: Namespace, nic: GuestNic, size: int) -> None:
    """A datagram of `size` bytes to the guest and the guest's answer, each in one frame."""
    payload = os.urandom(size)
    with open_udp(peer) as program:
        program.sendto(payload, (socket.inet_ntoa(nic.address), 7))
        question = nic.ip_packet(UDP, source_port=program.getsockname()[1])
        assert question.destination == nic.mac
        assert question.payload.endswith(payload)
        source_port, guest_port = struct.unpack_from(">HH", question.payload, 20)
        head = struct.pack(">HHHH", guest_port, source_port, 8 + size, 0)
        nic.answer_ip(question, head + payload[::-1])
        assert program.recv(70_000) == payload[::-1]


def neighbours(peer: Namespace, device: str) -> dict[str, str]:
    rows = peer.shown(f"neighbour show dev {device}")
    return {row["dst"]: row.get("lladdr", "") for row in rows}


@pytest.mark.parametrize("mtu", [1400, 1500, 9000])
def test_frames_both_ways_with_mac_and_mtu_kept(
    pair: tuple[Namespace, Namespace], mtu: int
) -> None:
    pod, peer = pair
    link(pod, peer, mtu=mtu)
    network = attach(pod.path)
    try:
        [device], [interface] = network.devices, network.interfaces
        assert (device.mac, device.mtu, interface.name) == (MAC, mtu, "eth0")
        NetConfig(tap_descriptor=0, mac=device.mac, mtu=device.mtu)
        nic = GuestNic(device.tap_fd, MAC, GUEST)
        with open_udp(peer) as program:
            program.sendto(b"x", (GUEST, 7))
            question = nic.answer_arp()
        assert question.destination == BROADCAST
        assert question.source.hex(":") == peer.shown("link show to-eth0")[0]["address"]
        udp_round_trip(peer, nic, 1)
        udp_round_trip(peer, nic, mtu - 28)
        assert neighbours(peer, "to-eth0") == {GUEST: MAC}
    finally:
        network.close()


def test_the_namespaces_own_stack_is_silent_until_the_end(
    pair: tuple[Namespace, Namespace],
) -> None:
    """It keeps the address, and would answer ARP and reset connections in the guest's place."""
    pod, peer = pair
    link(pod, peer)
    network = attach(pod.path)
    try:
        nic = GuestNic(network.devices[0].tap_fd, MAC, GUEST)
        client = peer.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        client.setblocking(False)
        with client:
            assert client.connect_ex((GUEST, 80)) == errno.EINPROGRESS
            nic.receive(lambda f: f.kind == ARP)
            assert neighbours(peer, "to-eth0") == {GUEST: ""}
            nic.answer_arp()  # the peer asks again
            syn = nic.ip_packet(TCP)
            # Whatever would have come back from the namespace is there by now.
            udp_round_trip(peer, nic, 100)
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            nic.answer_ip(syn, reset_of(syn.payload))
            client.settimeout(10)
            with pytest.raises(ConnectionRefusedError):
                client.connect((GUEST, 80))
        assert pod.shown("address show dev eth0")[0]["addr_info"][0]["local"] == GUEST
    finally:
        network.close()
    assert pod.links() == {"lo", "eth0"}
    assert "ingress" not in pod.qdiscs("eth0")
    with peer.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as client:
        client.settimeout(10)
        with pytest.raises(ConnectionRefusedError):
            client.connect((GUEST, 80))


def reset_of(syn: bytes) -> bytes:
    """The TCP header that refuses a SYN packet (RFC 9293 § 3.10.7.1)."""
    source, destination, sequence = struct.unpack_from(">HHI", syn, 20)
    head = struct.pack(">HHIIBBHHH", destination, source, 0, sequence + 1, 0x50, 0x14, 0, 0, 0)
    pseudo = syn[16:20] + syn[12:16] + struct.pack(">BBH", 0, TCP, len(head))
    return head[:16] + struct.pack(">H", internet_checksum(pseudo + head)) + head[18:]


def test_a_tap_has_no_address_of_its_own(pair: tuple[Namespace, Namespace]) -> None:
    """Else the namespace's stack would speak to the guest."""
    pod, peer = pair
    link(pod, peer)
    network = attach(pod.path)
    try:
        [tap] = pod.links() - {"lo", "eth0"}
        shown = pod.shown(f"address show dev {tap}")[0]
        assert shown["addr_info"] == []
        assert "UP" in shown["flags"]
        assert shown["mtu"] == 1500
    finally:
        network.close()


def test_two_interfaces_each_with_its_own_frames(pair: tuple[Namespace, Namespace]) -> None:
    pod, peer = pair
    link(pod, peer)
    pod.joined_to(peer, "net1", MAC2, mtu=1400)
    pod.ip("address add 198.51.100.2/24 dev net1")
    peer.ip("address add 198.51.100.1/24 dev to-net1")
    network = attach(pod.path)
    try:
        assert [row.name for row in network.interfaces] == ["eth0", "net1"]
        assert [(row.mac, row.mtu) for row in network.devices] == [(MAC, 1500), (MAC2, 1400)]
        addresses = (GUEST, "198.51.100.2")
        nics = [
            GuestNic(device.tap_fd, device.mac, address)
            for device, address in zip(network.devices, addresses, strict=True)
        ]
        for nic, other, address in ((nics[0], nics[1], GUEST), (nics[1], nics[0], addresses[1])):
            with open_udp(peer) as program:
                program.sendto(b"x", (address, 7))
                nic.answer_arp()
            udp_round_trip(peer, nic, 1200)
            assert other.take() is None
    finally:
        network.close()


def test_removal_after_the_namespace_and_twice(pair: tuple[Namespace, Namespace]) -> None:
    pod, peer = pair
    link(pod, peer)
    network = attach(pod.path)
    record = json.loads(json.dumps(network.record))
    pod.ip("link show eth0")
    run("ip", "netns", "delete", pod.name)
    network.close()
    network.close()
    detach(record)
    deadline = time.monotonic() + 10
    while "to-eth0" in peer.links():  # goes with the namespace, which nothing holds any more
        assert time.monotonic() < deadline


def test_removal_by_record_after_a_crash(pair: tuple[Namespace, Namespace]) -> None:
    """Shim and VMM are gone, so are their descriptors; the next one finds a clean interface."""
    pod, peer = pair
    link(pod, peer)
    network = attach(pod.path)
    record = json.loads(json.dumps(network.record))
    network.release_taps()
    assert pod.links() == {"lo", "eth0"}
    assert "ingress" in pod.qdiscs("eth0")
    for _ in range(2):
        detach(record)
        assert "ingress" not in pod.qdiscs("eth0")
    attach(pod.path).close()


def test_a_record_says_nothing_about_the_next_namespace_of_that_name(
    pair: tuple[Namespace, Namespace],
) -> None:
    pod, peer = pair
    link(pod, peer)
    old = attach(pod.path)
    old.release_taps()
    run("ip", "netns", "delete", pod.name)
    with namespaces("pod", "next") as (_, next_peer):
        pod.joined_to(next_peer, "eth0", MAC2)
        new = attach(pod.path)
        try:
            detach(old.record)
            assert "ingress" in pod.qdiscs("eth0")
        finally:
            new.close()


def test_an_interface_that_is_taken(pair: tuple[Namespace, Namespace]) -> None:
    pod, peer = pair
    link(pod, peer)
    network = attach(pod.path)
    try:
        before = pod.links()
        with pytest.raises(HostError, match=r"eth0 of .* has an ingress qdisc already"):
            attach(pod.path)
        assert pod.links() == before
        assert "ingress" in pod.qdiscs("eth0")
    finally:
        network.close()


def test_nothing_is_left_when_the_second_interface_fails(
    pair: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, peer = pair
    link(pod, peer)
    pod.joined_to(peer, "net1", MAC2)
    make = pod_network.make_tap

    def fail_later(name: str) -> int:
        if pod.links() == {"lo", "eth0", "net1"}:
            return make(name)
        raise HostError("no more TAPs")

    monkeypatch.setattr(pod_network, "make_tap", fail_later)
    with pytest.raises(HostError, match="no more TAPs"):
        attach(pod.path)
    assert pod.links() == {"lo", "eth0", "net1"}
    assert "ingress" not in pod.qdiscs("eth0") | pod.qdiscs("net1")


def test_a_namespace_with_loopback_only() -> None:
    with namespaces("pod") as [pod]:
        network = attach(pod.path)
        assert (network.devices, network.interfaces) == ([], [])
        network.close()


def test_no_namespace(tmp_path: os.PathLike[str]) -> None:
    file = os.path.join(tmp_path, "file")
    with open(file, "w"):
        pass
    for path, words in ((f"{file}.none", "cannot be opened"), (file, "is no network namespace")):
        with pytest.raises(CallerError, match=words):
            attach(path)
        detach({"namespace": path, "cookie": 0, "joins": []})


@pytest.mark.parametrize("record", [{}, {"namespace": "/x", "cookie": 1, "joins": [{}]}])
def test_a_damaged_record(record: dict[str, object]) -> None:
    with pytest.raises(HostError, match="is damaged"):
        detach(record)


def test_the_process_never_enters_the_namespace(pair: tuple[Namespace, Namespace]) -> None:
    pod, peer = pair
    link(pod, peer)
    before = os.stat("/proc/thread-self/ns/net").st_ino
    fds = len(os.listdir("/proc/self/fd"))
    network: PodNetwork = attach(pod.path)
    network.close()
    assert os.stat("/proc/thread-self/ns/net").st_ino == before
    assert len(os.listdir("/proc/self/fd")) == fds
