"""Interfaces of a restored guest that are to become others, in a network namespace."""

from __future__ import annotations

import pytest
from agent_harness import run
from guest_interfaces import MAC, MAC_2, configure_in, shown

from vmcell_agent.network import plan
from vmcell_protos.agent import Interface, Neighbour, Route
from vmcell_protos.errors import CallerError

NEW, NEW_2 = "02:00:00:00:01:07", "02:00:00:00:01:08"

FIRST = Interface(
    name="eth0",
    mac=MAC,
    mtu=1400,
    addresses=["10.1.0.2/24", "10.1.0.3/24", "10.9.0.1/32", "fd01::2/64"],
    gateway="10.1.0.1",
    routes=[
        Route(destination="10.1.0.0/24"),
        Route(destination="10.4.0.0/16", gateway="10.1.0.9"),
        Route(destination="fd05::/16", gateway="fe80::1"),
        Route(destination="::/0", gateway="fe80::1"),
    ],
    neighbours=[
        Neighbour(address="10.1.0.1", mac="02:00:00:00:00:fe"),
        Neighbour(address="fe80::1", mac="02:00:00:00:00:fd"),
    ],
)


def everything_of(namespace: str, name: str) -> list[str]:
    """Addresses, routes of every table and neighbours, without what the kernel makes by itself for
    each interface that is up (link-local and multicast)."""
    found = [
        row["local"]
        for row in shown(namespace, "address", "show", "dev", name)[0]["addr_info"]
        if row["scope"] == "global"
    ]
    for family in ("-4", "-6"):
        rows = shown(namespace, family, "route", "show", "table", "all", "dev", name)
        found += [
            f"{row.get('type', 'unicast')} {row['dst']}"
            for row in rows
            if not row["dst"].startswith(("fe80:", "ff00:"))
        ]
    found += [row["dst"] for row in shown(namespace, "neighbour", "show", "dev", name)]
    return sorted(found)


@pytest.mark.root
def test_a_restored_interface_has_nothing_of_what_it_was(namespace: str) -> None:
    assert configure_in(namespace, FIRST) == ""
    # What the containers of a guest may have added.
    run("ip", "-n", namespace, "route", "add", "10.77.0.0/16", "dev", "eth0", "table", "77")
    run("ip", "-n", namespace, "-6", "route", "add", "fd77::/64", "dev", "eth0", "table", "77")
    run("ip", "-n", namespace, "address", "add", "10.8.0.1/30", "dev", "eth0", "label", "eth0:x")
    again = Interface(
        name="eth0",
        mac=NEW,
        present_mac=MAC.upper(),
        mtu=1300,
        addresses=["10.2.0.2/31"],
        gateway="10.2.0.3",
    )
    assert configure_in(namespace, again) == ""
    link = shown(namespace, "link", "show", "eth0")[0]
    assert (link["address"], link["mtu"], link["operstate"]) == (NEW, 1300, "UP")
    assert everything_of(namespace, "eth0") == sorted(
        ["10.2.0.2", "unicast default", "unicast 10.2.0.2/31", "local 10.2.0.2"]
    )
    # Said once more, as after a call that went wrong behind it; and as an ordinary call.
    before = everything_of(namespace, "eth0")
    assert configure_in(namespace, again) == ""
    assert everything_of(namespace, "eth0") == before
    assert configure_in(namespace, Interface(mac=NEW, addresses=["10.2.0.2/31"])) == ""
    assert everything_of(namespace, "eth0") == before


@pytest.mark.root
def test_another_interface_keeps_what_it_has(namespace: str) -> None:
    second = Interface(name="net1", mac=MAC_2, addresses=["10.3.0.2/24"], gateway="10.3.0.1")
    assert configure_in(namespace, FIRST, second) == ""
    before = everything_of(namespace, "net1")
    changed = Interface(mac=NEW, present_mac=MAC, addresses=["10.2.0.2/24"])
    assert configure_in(namespace, changed) == ""
    assert everything_of(namespace, "net1") == before
    assert shown(namespace, "link", "show", "eth0")[0]["address"] == NEW  # the name stays


@pytest.mark.root
def test_two_interfaces_change_places(namespace: str) -> None:
    pair = [Interface(name="eth0", mac=MAC), Interface(name="eth1", mac=MAC_2)]
    assert configure_in(namespace, *pair) == ""
    indexes = {row["ifname"]: row["ifindex"] for row in shown(namespace, "link", "show")}
    swapped = [
        Interface(name="eth1", mac=MAC_2, present_mac=MAC, addresses=["10.1.0.2/24"]),
        Interface(name="eth0", mac=MAC, present_mac=MAC_2, addresses=["10.2.0.2/24"]),
    ]
    assert configure_in(namespace, *swapped) == ""
    rows = {row["ifname"]: row for row in shown(namespace, "address", "show")}
    for name, other, mac, address in (
        ("eth1", "eth0", MAC_2, "10.1.0.2"),
        ("eth0", "eth1", MAC, "10.2.0.2"),
    ):
        assert rows[name]["ifindex"] == indexes[other]
        assert rows[name]["address"] == mac
        assert rows[name]["addr_info"][0]["local"] == address


@pytest.mark.root
def test_a_change_that_cannot_be_made_is_a_sentence(namespace: str) -> None:
    missing = Interface(mac=NEW, present_mac="02:00:00:00:99:99")
    assert configure_in(namespace, missing) == "no interface has MAC address '02:00:00:00:99:99'"
    twice = [Interface(mac=NEW, present_mac=MAC), Interface(mac=MAC, addresses=["10.0.0.1/8"])]
    assert configure_in(namespace, *twice) == "two interfaces of the request are the device raw0"
    assert shown(namespace, "link", "show", "raw0")[0]["address"] == MAC  # nothing was begun


@pytest.mark.parametrize(
    ("mac", "present_mac", "words"),
    [
        (NEW, "x" * 5000, "present_mac of an interface is 'xxx"),
        (NEW, "00:00:00:00:00:00", "no device's own"),
        (NEW, "ff:ff:ff:ff:ff:ff", "no device's own"),
        ("", MAC, "mac of an interface is '', no MAC address"),
        ("01:00:5e:00:00:01", MAC, "no device's own"),
    ],
)
def test_addresses_that_no_device_can_have(mac: str, present_mac: str, words: str) -> None:
    with pytest.raises(CallerError, match=words):
        plan([Interface(mac=mac, present_mac=present_mac)])
