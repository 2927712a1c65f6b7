"""Slots with real TAPs and nftables: the test plays the guest and writes its frames itself.

Whether something is dropped is seen without waiting: after the frame under test the guest sends one
that is known to pass, and when that has arrived the other one would have, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from own_netns import own_netns

from vmcell_api.egress import CLOSED, OPEN, Egress
from vmcell_api.node import firewall
from vmcell_api.node.slot_plan import Slot
from vmcell_api.node.slots import SlotPool
from vmcell_protos.errors import HostError

pytestmark = pytest.mark.root

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
PATIENCE_S = 10.0
OUTSIDE = "93.184.216.34"
MARK = b"known to pass"


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    with own_netns():
        # The way out: whatever is routed leaves through the TAP "out", where the test listens.
        for words in (
            "tuntap add dev out mode tap",
            "addr add 198.18.0.1/24 dev out",
            "link set out up",
            "neigh add 198.18.0.2 lladdr 02:00:00:00:00:02 dev out nud permanent",
            "route add default via 198.18.0.2",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        opened = SlotPool(network="10.88.0.0/16", slot_count=3, nameservers=("198.18.0.2",))
        opened.open({})
        try:
            yield opened
        finally:
            opened.close_all()
            assert "vmc" not in _run("ip", "link")
            assert "vmcell" not in _run("nft", "list", "tables")


def _claim_again(pool: SlotPool, slot: Slot) -> Slot:
    """The slot's next turn; the one that has been free for longest comes first."""
    for _ in range(pool.slot_count):
        if pool.claim(OPEN).number == slot.number:
            return slot
    raise AssertionError(f"slot {slot.number} did not come round")


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=20).stdout


class Guest:
    """The far end of a slot's TAP."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.fd = _open_tap(slot.tap)

    def close(self) -> None:
        os.close(self.fd)

    def send(
        self,
        destination: str,
        payload: bytes,
        *,
        port: int = 7,
        source_port: int = 9,
        source: str = "",
        mac: str = "",
    ) -> None:
        """One UDP datagram."""
        udp = struct.pack(">HHHH", source_port, port, 8 + len(payload), 0) + payload
        ends = socket.inet_aton(source or self.slot.guest_address) + socket.inet_aton(destination)
        ip = _ipv4(ends, len(udp))
        ethernet = _mac(self.slot.host_mac) + _mac(mac or self.slot.guest_mac) + b"\x08\x00"
        os.write(self.fd, ethernet + ip + udp)

    def send_ipv6(self) -> None:
        """A neighbour solicitation's worth of IPv6."""
        ethernet = _mac(self.slot.host_mac) + _mac(self.slot.guest_mac) + b"\x86\xdd"
        ip = struct.pack(">IHBB", 6 << 28, 0, 59, 64) + b"\xfe\x80" + bytes(30)
        os.write(self.fd, ethernet + ip)

    def ask_arp(self, address: str, *, source: str = "") -> None:
        """Who has `address`?"""
        ethernet = b"\xff" * 6 + _mac(self.slot.guest_mac) + b"\x08\x06"
        sender = _mac(self.slot.guest_mac) + socket.inet_aton(source or self.slot.guest_address)
        question = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + sender
        os.write(self.fd, ethernet + question + bytes(6) + socket.inet_aton(address))

    def accept_tcp(self) -> None:
        """Answers the SYN that comes next."""
        while True:
            assert select.select([self.fd], [], [], PATIENCE_S)[0], "no SYN came"
            frame = os.read(self.fd, 65536)
            if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_TCP:
                break
        ports, sequence = struct.unpack(">HH", frame[34:38]), struct.unpack(">I", frame[38:42])[0]
        ends = frame[30:34] + frame[26:30]
        flags = 5 << 12 | 0x12
        tcp = struct.pack(">HHIIHHHH", ports[1], ports[0], 1, sequence + 1, flags, 65535, 0, 0)
        total = sum(struct.unpack(">16H", ends + struct.pack(">HH", 6, 20) + tcp))
        checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        tcp = tcp[:16] + struct.pack(">H", checksum) + tcp[18:]
        ip = _ipv4(ends, len(tcp), protocol=socket.IPPROTO_TCP)
        os.write(self.fd, frame[6:12] + frame[:6] + b"\x08\x00" + ip + tcp)

    def receive(self, payload: bytes) -> bytes:
        """The next frame that holds `payload`."""
        return _until(self.fd, payload)


def _ipv4(ends: bytes, length_bytes: int, protocol: int = socket.IPPROTO_UDP) -> bytes:
    """An IPv4 header; `ends` are source and destination."""
    start = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length_bytes, 1, 0, 64, protocol, 0)
    total = sum(struct.unpack(">10H", start + ends))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return start[:10] + struct.pack(">H", checksum) + ends


def _host_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    # The kernel wakes the queue a moment after the carrier; what is sent before is dropped.
    deadline = time.monotonic() + PATIENCE_S
    while json.loads(_run("ip", "-j", "link", "show", name))[0]["operstate"] != "UP":
        assert time.monotonic() < deadline, f"{name} did not come up"
    return fd


def _until(fd: int, payload: bytes, others: list[bytes] | None = None) -> bytes:
    """The next frame on `fd` that holds `payload`; those before it go to `others`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{payload!r} did not arrive"
        frame = os.read(fd, 65536)
        if payload in frame:
            return frame
        if others is not None:
            others.append(frame)


@contextlib.contextmanager
def _guest(slot: Slot) -> Iterator[Guest]:
    guest = Guest(slot)
    try:
        yield guest
    finally:
        guest.close()


@contextlib.contextmanager
def _way_out() -> Iterator[int]:
    """A descriptor on which every frame arrives that leaves through "out"."""
    fd = _open_tap("out")
    try:
        yield fd
    finally:
        os.close(fd)


def _leaves(
    out: int, guest: Guest, witness: Guest, destination: str, port: int = 7
) -> bytes | None:
    """The frame that left for `destination`, None when it was dropped."""
    seen: list[bytes] = []
    guest.send(destination, b"question", port=port)
    witness.send(OUTSIDE, MARK)
    _until(out, MARK, seen)
    return next((frame for frame in seen if b"question" in frame), None)


def test_out_to_the_internet_and_nowhere_else(pool: SlotPool) -> None:
    with (
        _guest(pool.claim(OPEN)) as guest,
        _guest(pool.claim(CLOSED)) as closed,
        _way_out() as out,
    ):
        frame = _leaves(out, guest, guest, OUTSIDE)
        assert frame is not None
        assert frame[26:30] == socket.inet_aton("198.18.0.1"), "the source is masqueraded"
        for private in ("10.1.2.3", "172.16.9.9", "192.168.1.1", "169.254.169.254", "100.100.2.3",
                        "198.18.0.2", "224.0.0.1", "255.255.255.255", "0.1.2.3"):  # fmt: skip
            assert _leaves(out, guest, guest, private) is None, private
        assert _leaves(out, closed, guest, OUTSIDE) is None


RULES = [
    (Egress(deny_out=("93.184.216.0/24",)), {OUTSIDE: False, "1.1.1.1": True}),
    (Egress(deny_out=("0.0.0.0/0",)), {OUTSIDE: False, "1.1.1.1": False}),
    (
        Egress(allow_out=(OUTSIDE,), deny_out=("0.0.0.0/0", "::/0")),
        {OUTSIDE: True, "93.184.216.35": False, "1.1.1.1": False},
    ),
    (
        Egress(allow_internet=False, allow_out=("93.184.216.34/30", "93.184.216.32/28")),
        {OUTSIDE: True, "93.184.216.47": True, "93.184.216.48": False},
    ),
    (
        Egress(allow_out=("0.0.0.0/0",), deny_out=("1.1.1.1",)),
        {OUTSIDE: True, "1.1.1.1": True, "10.1.2.3": False, "169.254.169.254": False},
    ),
    (Egress(allow_out=(OUTSIDE,)), {OUTSIDE: True, "1.1.1.1": True}),
]


@pytest.mark.parametrize(("rules", "expected"), RULES)
def test_rules_by_address(pool: SlotPool, rules: Egress, expected: dict[str, bool]) -> None:
    """At a claim, after a change, and when a new noded opens the slots again."""
    claimed, changed, witness = pool.claim(rules), pool.claim(CLOSED), pool.claim(OPEN)
    pool.set_egress(changed.number, Egress(deny_out=("8.8.8.8",)))
    pool.set_egress(changed.number, rules)
    with _guest(witness) as passing, _way_out() as out:
        for slot in (claimed, changed):
            with _guest(slot) as guest:
                for address, passes in expected.items():
                    left = _leaves(out, guest, passing, address)
                    assert (left is not None) is passes, (address, slot.tap)
        taken = {slot.number: rules for slot in (claimed, changed)}
        again = SlotPool(network="10.88.0.0/16", slot_count=3)
        again.open({**taken, witness.number: OPEN})
        with _guest(claimed) as guest:
            for address, passes in expected.items():
                assert (_leaves(out, guest, passing, address) is not None) is passes, address
        again.release(claimed.number)
        assert f"rules_{claimed.tap}" not in _run("nft", "list", "table", "inet", "vmcell")
        with _guest(claimed) as guest:
            assert _leaves(out, guest, passing, "1.1.1.1") is not None


def test_rules_hold_for_the_name_server_too(pool: SlotPool) -> None:
    denied, witness = pool.claim(Egress(deny_out=("0.0.0.0/0",))), pool.claim(OPEN)
    with _guest(denied) as guest, _guest(witness) as passing, _way_out() as out:
        assert _leaves(out, guest, passing, "198.18.0.2", port=53) is None
        pool.set_egress(denied.number, OPEN)
        assert _leaves(out, guest, passing, "198.18.0.2", port=53) is not None


def test_a_connection_that_a_change_denies_ends(pool: SlotPool) -> None:
    slot = pool.claim(OPEN)
    other = "1.1.1.1"
    with _guest(slot) as guest, _way_out() as out:
        leaving = {}
        for address, source_port in ((OUTSIDE, 4000), (other, 4001)):
            guest.send(address, MARK, source_port=source_port)
            leaving[address] = _until(out, MARK)
            os.write(out, _answer_to(leaving[address], b"answer"))
            guest.receive(b"answer")
        pool.set_egress(slot.number, Egress(deny_out=(OUTSIDE,)))
        os.write(out, _answer_to(leaving[OUTSIDE], b"denied peer"))
        os.write(out, _answer_to(leaving[other], b"allowed peer"))
        seen: list[bytes] = []
        _until(guest.fd, b"allowed peer", seen)
        assert not [frame for frame in seen if b"denied peer" in frame]


def test_a_new_noded_forgets_the_connections_of_free_slots(pool: SlotPool) -> None:
    """The last one may have died when the sandbox was gone and its slot not yet released."""
    slot = pool.claim(OPEN)
    with _guest(slot) as guest, _way_out() as out:
        guest.send(OUTSIDE, MARK, source_port=4000)
        answer = _answer_to(_until(out, MARK), b"late answer")
        os.write(out, answer)
        guest.receive(b"late answer")
        again = SlotPool(network="10.88.0.0/16", slot_count=3)
        again.open({})
        os.write(out, answer)
        guest.send(OUTSIDE, b"of the next", port=8, source_port=4001)
        os.write(out, _answer_to(_until(out, b"of the next"), b"fresh answer"))
        seen: list[bytes] = []
        _until(guest.fd, b"fresh answer", seen)
        assert not [frame for frame in seen if b"late answer" in frame]


def test_a_private_name_server_is_open_on_its_port(pool: SlotPool) -> None:
    with (
        _guest(pool.claim(OPEN)) as guest,
        _guest(pool.claim(CLOSED)) as closed,
        _way_out() as out,
    ):
        assert _leaves(out, guest, guest, "198.18.0.2", port=53) is not None
        assert _leaves(out, guest, guest, "198.18.0.2", port=54) is None
        assert _leaves(out, closed, guest, "198.18.0.2", port=53) is None


def test_a_released_slot_has_its_internet_again(pool: SlotPool) -> None:
    closed = pool.claim(CLOSED)
    pool.release(closed.number)
    pool.release(closed.number)
    assert pool.free_count == 3
    again = _claim_again(pool, closed)
    assert again == closed
    with _guest(again) as guest, _way_out() as out:
        assert _leaves(out, guest, guest, OUTSIDE) is not None


def test_the_peers_of_the_last_sandbox_do_not_reach_the_next(pool: SlotPool) -> None:
    slot = pool.claim(OPEN)
    with _guest(slot) as guest, _way_out() as out, _host_socket() as host:
        guest.send(OUTSIDE, MARK, port=7, source_port=4000)
        leaving = _until(out, MARK)
        answer = _answer_to(leaving, b"late answer")
        os.write(out, answer)
        guest.receive(b"late answer")
        pool.release(slot.number)
        _claim_again(pool, slot)
        os.write(out, answer)
        # What comes from outside is taken in order: the second frame is through when this is.
        guest.send(OUTSIDE, b"of the next", port=8, source_port=4001)
        os.write(out, _answer_to(_until(out, b"of the next"), b"fresh answer"))
        seen: list[bytes] = []
        _until(guest.fd, b"fresh answer", seen)
        host.sendto(MARK, (slot.guest_address, 7))
        _until(guest.fd, MARK, seen)
        assert not [frame for frame in seen if b"late answer" in frame]


def test_what_was_meant_for_the_last_sandbox_does_not_reach_the_next(pool: SlotPool) -> None:
    slot = pool.claim(OPEN)
    with _guest(slot) as guest, _host_socket() as host, socket.socket() as proxy:
        proxy.setblocking(False)
        proxy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proxy.connect_ex((slot.guest_address, 7))
        guest.accept_tcp()
        select.select([], [proxy], [], PATIENCE_S)
        proxy.send(b"of the last")
        guest.receive(b"of the last")
        waiting = threading.Thread(target=_wait_for_the_end, args=(proxy, ended := []))
        waiting.start()
        pool.cut(slot.number)
        waiting.join(PATIENCE_S)
        assert ended, "a connection to an ended sandbox ends"
        pool.release(slot.number)
        _claim_again(pool, slot)
        with contextlib.suppress(OSError):
            proxy.send(b"secret")
        host.sendto(MARK, (slot.guest_address, 7))
        seen: list[bytes] = []
        _until(guest.fd, MARK, seen)
        assert not [frame for frame in seen if b"secret" in frame or b"of the last" in frame]


def _wait_for_the_end(connection: socket.socket, ended: list[bool]) -> None:
    if select.select([connection], [], [], PATIENCE_S)[0]:
        ended.append(True)


def test_arp_tells_the_gateway_and_no_other_address_of_the_host(pool: SlotPool) -> None:
    slot = pool.claim(OPEN)
    with _guest(slot) as guest:
        guest.ask_arp("198.18.0.1")
        guest.ask_arp(slot.host_address, source=pool.at(2).guest_address)
        guest.ask_arp(slot.host_address)
        told: list[bytes] = []
        _until(guest.fd, _mac(slot.host_mac) + socket.inet_aton(slot.host_address), told)
        assert not [frame for frame in told if frame[12:14] == b"\x08\x06"]


def _answer_to(frame: bytes, payload: bytes) -> bytes:
    """A UDP datagram the other way round, as the far end would send it."""
    ports = struct.unpack(">HH", frame[34:38])
    udp = struct.pack(">HHHH", ports[1], ports[0], 8 + len(payload), 0) + payload
    ip = _ipv4(frame[30:34] + frame[26:30], len(udp))
    return frame[6:12] + frame[:6] + b"\x08\x00" + ip + udp


def test_only_as_itself(pool: SlotPool) -> None:
    with _guest(pool.claim(OPEN)) as guest, _way_out() as out:
        other = pool.claim(OPEN)
        for disguise in (
            {"source": other.guest_address},
            {"source": "8.8.8.8"},
            {"mac": other.guest_mac},
        ):
            seen: list[bytes] = []
            guest.send(OUTSIDE, b"question", **disguise)
            guest.send_ipv6()
            guest.send(OUTSIDE, MARK)
            _until(out, MARK, seen)
            assert not [frame for frame in seen if b"question" in frame], disguise


def test_not_to_another_sandbox(pool: SlotPool) -> None:
    one, two = pool.claim(OPEN), pool.claim(OPEN)
    with (
        _guest(one) as guest,
        _guest(two) as victim,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host,
    ):
        guest.send(two.guest_address, b"question")
        host.sendto(MARK, (two.guest_address, 7))
        seen: list[bytes] = []
        _until(victim.fd, MARK, seen)
        assert not [frame for frame in seen if b"question" in frame]


def test_the_host_reaches_the_guest_but_not_the_other_way(pool: SlotPool) -> None:
    with (
        _guest(pool.claim(OPEN)) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening,
    ):
        slot = guest.slot
        listening.bind(("0.0.0.0", 5353))
        listening.settimeout(PATIENCE_S)
        asking.settimeout(PATIENCE_S)
        asking.sendto(b"hello", (slot.guest_address, 7))
        frame = guest.receive(b"hello")
        assert frame[:6] == _mac(slot.guest_mac), "no ARP needed: the neighbour is permanent"
        own_port = asking.getsockname()[1]
        for address in (slot.host_address, "198.18.0.1"):
            guest.send(address, b"uninvited", port=5353)
        guest.send(slot.host_address, b"reply", port=own_port, source_port=7)
        assert asking.recv(100) == b"reply"
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.recv(100)


def test_opening_again_keeps_running_sandboxes(pool: SlotPool) -> None:
    closed = pool.claim(CLOSED)
    second = SlotPool(network="10.88.0.0/16", slot_count=2)
    second.open({closed.number: CLOSED, 9: OPEN})
    assert second.free_count == 1
    egress = _run("nft", "list", "map", "inet", "vmcell", "egress")
    assert f'"{closed.tap}"' not in egress
    assert '"vmc9"' in egress
    assert second.claim(OPEN).number != closed.number
    with pytest.raises(HostError, match="all 2 sandbox slots") as caught:
        second.claim(OPEN)
    assert caught.value.code == "resource_exhausted"
    second.release(9)
    assert second.free_count == 0, "slot 9 is beyond the pool and does not come back"


def test_the_tap_is_one_a_virtio_device_can_take(pool: SlotPool) -> None:
    (link,) = json.loads(_run("ip", "-j", "-d", "link", "show", "vmc2"))
    info = link["linkinfo"]["info_data"]
    assert (info["type"], info["vnet_hdr"], info["persist"]) == ("tap", True, True)
    assert link["address"] == pool.at(2).host_mac


def test_a_refused_rule_is_one_sentence() -> None:
    with pytest.raises(HostError, match="nft refused"):
        firewall.apply([{"add": {"table": {"family": "nonsense", "name": "x"}}}])


def test_the_slot_that_is_free_for_longest_comes_first(pool: SlotPool) -> None:
    """So that an answer of the router that is a moment old does not name another sandbox's slot."""
    first = pool.claim(OPEN)
    pool.release(first.number)
    taken = [pool.claim(OPEN).number for _ in range(pool.slot_count)]
    assert taken[-1] == first.number
