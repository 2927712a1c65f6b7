"""Interfaces read from real namespaces, and the guest's agent making the same of them."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pod_namespaces import GuestNic, Namespace, namespaces, run

from vmcell_protos.agent import Interface
from vmcell_protos.errors import CallerError
from vmcell_shim.interfaces import read_interfaces
from vmcell_shim.pod_network import attach
from vmcell_shim.rtnetlink_socket import RtnetlinkSocket

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
MAC = "02:00:00:00:00:07"

# What plugins leave behind, as ip(8) commands for eth0.
PLUGINS = {
    "bridge": [
        "address add 10.88.0.3/16 dev eth0",
        "address add fd00:88::3/64 dev eth0 nodad",
        "route add default via 10.88.0.1",
        "-6 route add default via fd00:88::1",
    ],
    "ptp": [
        "address add 10.1.2.3/24 dev eth0",
        "route del 10.1.2.0/24 dev eth0",
        "route add 10.1.2.1/32 dev eth0 src 10.1.2.3",
        "route add 10.1.2.0/24 via 10.1.2.1 src 10.1.2.3",
        "route add default via 10.1.2.1",
        "address add fd00:2::3/64 dev eth0 nodad",
        "-6 route del fd00:2::/64 dev eth0",
        "-6 route add fd00:2::1 dev eth0",
        "-6 route add default via fd00:2::1",
    ],
    "calico": [
        "address add 10.244.7.9/32 dev eth0",
        "route add 169.254.1.1 dev eth0",
        "route add default via 169.254.1.1",
    ],
    "aws": [
        "address add 10.2.3.4/32 dev eth0",
        "route add 169.254.1.1 dev eth0",
        "route add default via 169.254.1.1",
        "neighbour add 169.254.1.1 lladdr 02:00:00:00:00:fe dev eth0 nud permanent",
        "neighbour add 10.2.3.9 lladdr 02:00:00:00:00:fd dev eth0 nud reachable",
    ],
    "cilium": [
        "address add 10.0.1.7/32 dev eth0",
        "address add fd00:c::7/128 dev eth0 nodad",
        "route add 10.0.1.10 dev eth0",
        "route add default via 10.0.1.10 mtu 1450",
        "-6 route add fd00:c::a dev eth0",
        "-6 route add default via fd00:c::a mtu 1450",
    ],
    "two of each": [
        "address add 10.5.0.2/24 dev eth0",
        "address add 10.5.0.3/24 dev eth0",
        "address add 10.6.0.2 peer 10.6.0.1/32 dev eth0",
        "route add default via 10.5.0.1 metric 100",
        "route add default via 10.5.0.254 metric 200",
        "route add 172.16.0.0/12 via 10.6.0.1",
        "route add 192.168.9.0/24 via inet6 fe80::1 dev eth0",
    ],
    "nothing": [],
}


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    with namespaces("pod", "peer") as (pod, peer):
        yield pod, peer


def read(pod: Namespace) -> list[Interface]:
    with pod.inside(RtnetlinkSocket) as kernel:
        return [interface for _, interface in read_interfaces(kernel)]


def tables(namespace: Namespace) -> dict[str, Any]:
    """What there is, without what only says who has put it there."""
    rows = {
        "address": namespace.shown("address show dev eth0 scope global")[0].get("addr_info", []),
        "route": namespace.shown("route show dev eth0"),
        "route6": namespace.shown("-6 route show dev eth0"),
        "neighbour": namespace.shown("neighbour show dev eth0 nud permanent"),
    }
    kept = ("local", "prefixlen", "dst", "gateway", "via", "prefsrc", "metric", "metrics", "lladdr")
    return {
        table: sorted(
            json.dumps({key: row[key] for key in kept if key in row})
            for row in found
            if not str(row.get("dst", "")).startswith("fe80:")
        )
        for table, found in rows.items()
    }


def configure(guest: Namespace, interface: Interface) -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'guest-agent'), str(ROOT / 'protos')]!r}\n"
        "from vmcell_agent.network import configure, plan\n"
        "from vmcell_protos.agent import Interface\n"
        f"configure(plan([Interface.decode({interface.encode()!r})]))\n"
    )
    run("ip", "netns", "exec", guest.name, sys.executable, "-I", "-S", "-B", "-c", code)


@pytest.mark.parametrize("commands", PLUGINS.values(), ids=PLUGINS)
def test_the_guests_tables_are_the_namespaces(
    pair: tuple[Namespace, Namespace], commands: list[str]
) -> None:
    pod, peer = pair
    pod.joined_to(peer, "eth0", MAC, mtu=1450)
    for command in commands:
        pod.ip(command)
    [interface] = read(pod)
    assert (interface.name, interface.mac, interface.mtu) == ("eth0", MAC, 1450)
    with namespaces("guest", "guest-peer") as (guest, guest_peer):
        guest.joined_to(guest_peer, "raw7", MAC)
        guest.ip("link set raw7 down")
        configure(guest, interface)
        assert tables(guest) == tables(pod)
        assert any(tables(guest).values()) == bool(commands)


def test_link_local_addresses_stay_behind(pair: tuple[Namespace, Namespace]) -> None:
    """Each stack has its own; two with the same would find each other by duplicate detection."""
    pod, peer = pair
    pod.joined_to(peer, "eth0", MAC)
    pod.ip("address add fe80::7/64 dev eth0 nodad")
    pod.ip("address add 169.254.7.7/16 dev eth0")
    [interface] = read(pod)
    assert interface.addresses == ["169.254.7.7/16"]
    assert [route.destination for route in interface.routes] == ["169.254.0.0/16"]


def test_what_is_down_or_part_of_a_bridge_is_left_alone(
    pair: tuple[Namespace, Namespace],
) -> None:
    pod, peer = pair
    pod.joined_to(peer, "net1", "02:00:00:00:00:01")
    pod.joined_to(peer, "port1", "02:00:00:00:00:02")
    pod.joined_to(peer, "spare", "02:00:00:00:00:03")
    pod.ip("link set spare down")
    pod.ip("link add br0 address 02:00:00:00:00:04 type bridge")
    pod.ip("link set port1 master br0")
    pod.ip("link set br0 up")
    assert [interface.name for interface in read(pod)] == ["net1", "br0"]


def test_more_interfaces_than_a_machine_has(pair: tuple[Namespace, Namespace]) -> None:
    pod, peer = pair
    for number in range(4):
        pod.joined_to(peer, f"net{number}", f"02:00:00:00:00:{number:02}")
    assert [interface.name for interface in read(pod)] == ["net0", "net1", "net2", "net3"]
    pod.joined_to(peer, "net4", "02:00:00:00:00:04")
    with pytest.raises(CallerError, match=r"has 5 interfaces; a microVM takes 4.* leaves out net4"):
        read(pod)


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (["tuntap add vpn0 mode tun", "link set vpn0 up"], r"vpn0 \(tun\) .* no Ethernet"),
        (["link set eth0 arp off"], r"eth0 \(veth\) .* does no ARP"),
        (["link set eth0 mtu 500"], "has MTU 500"),
        (
            [
                "address add 10.0.0.2/24 dev eth0",
                "route add 10.9.0.0/16 nexthop via 10.0.0.1 nexthop via 10.0.0.3",
            ],
            "route to 10.9.0.0/16 .* several gateways",
        ),
        (
            ["link add br0 type bridge", f"link set br0 address {MAC}", "link set br0 up"],
            f"eth0 and br0 .* same MAC address {MAC}",
        ),
    ],
)
def test_what_a_guest_cannot_have(
    pair: tuple[Namespace, Namespace], commands: list[str], words: str
) -> None:
    pod, peer = pair
    pod.joined_to(peer, "eth0", MAC)
    for command in commands:
        pod.ip(command)
    with pytest.raises(CallerError, match=words):
        read(pod)


def test_a_macvlan_is_joined_as_well(pair: tuple[Namespace, Namespace]) -> None:
    """Frames of a sibling reach the guest, and the guest's reach the sibling."""
    pod, peer = pair
    peer.ip("link add parent type veth peer parent2")
    peer.ip("link set parent up")
    peer.ip("link set parent2 up")
    for name, mac in (("eth0", MAC), ("sibling", "02:00:00:00:00:09")):
        peer.ip(f"link add link parent name {name} address {mac} type macvlan mode bridge")
    peer.ip(f"link set eth0 netns {pod.name}")
    pod.ip("link set eth0 up")
    peer.ip("address add 192.0.2.1/24 dev sibling")
    peer.ip("link set sibling up")
    network = attach(pod.path)
    try:
        assert network.interfaces[0].mac == MAC
        nic = GuestNic(network.devices[0].tap_fd, MAC, "192.0.2.2")
        with peer.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as program:
            program.sendto(b"question", ("192.0.2.2", 7))
            nic.answer_arp()
            assert nic.ip_packet(17).payload.endswith(b"question")
        assert peer.shown("neighbour show dev sibling")[0]["lladdr"] == MAC
    finally:
        network.close()
