"""Interfaces configured in a network namespace of the test's own, read back with ip(8)."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from agent_harness import ROOT, run
from guest_interfaces import MAC, MAC_2, configure_in, shown
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent.network import (
    MAX_INTERFACES,
    MAX_NEIGHBOURS,
    MAX_ROUTES,
    configure,
    plan,
)
from vmcell_protos import rtnetlink as netlink
from vmcell_protos.agent import Interface, Neighbour, Route
from vmcell_protos.errors import CallerError


@pytest.mark.root
@pytest.mark.parametrize(
    ("addresses", "gateway"),
    [
        (["10.88.0.3/31"], "10.88.0.2"),
        (["10.0.0.5/32"], "169.254.1.1"),
        (["192.168.7.2/24", "192.168.8.2/24"], "192.168.7.1"),
    ],
)
def test_name_mtu_addresses_and_route(namespace: str, addresses: list[str], gateway: str) -> None:
    interface = Interface(name="eth0", mac=MAC, addresses=addresses, mtu=1400, gateway=gateway)
    assert configure_in(namespace, interface) == ""
    assert configure_in(namespace, Interface(mac=MAC, addresses=addresses)) == ""  # again
    link = shown(namespace, "address", "show", "eth0")[0]
    assert (link["mtu"], link["operstate"]) == (1400, "UP")
    found = [f"{row['local']}/{row['prefixlen']}" for row in link["addr_info"]]
    assert [text for text in found if ":" not in text] == addresses
    routes = shown(namespace, "route", "show", "default")
    assert [(row["gateway"], row["dev"]) for row in routes] == [(gateway, "eth0")]
    assert "UP" in shown(namespace, "link", "show", "lo")[0]["flags"]


def routes(namespace: str, *words: str) -> list[tuple[str, str, str]]:
    """(destination, gateway, interface) of the routes that are not the kernel's own."""
    rows = shown(namespace, *words, "route", "show", "proto", "boot")
    return [(row["dst"], row.get("gateway", ""), row["dev"]) for row in rows]


@pytest.mark.root
def test_ipv6_can_be_used_at_once(namespace: str) -> None:
    interface = Interface(
        name="eth0",
        mac=MAC.upper(),
        addresses=["fd00::2/64", "10.0.0.2/24", "fd01::2/128"],
        gateway="fd00::1",
        routes=[
            Route(destination="fd05::/16", gateway="fe80::1"),
            Route(destination="fd06::/48"),
        ],
    )
    assert configure_in(namespace, interface) == ""
    assert configure_in(namespace, interface) == ""
    assert sorted(routes(namespace, "-6")) == [
        ("default", "fd00::1", "eth0"),
        ("fd05::/16", "fe80::1", "eth0"),
        ("fd06::/48", "", "eth0"),
    ]
    link = shown(namespace, "address", "show", "eth0")[0]
    ours = [row for row in link["addr_info"] if row["scope"] == "global"]
    assert sorted(row["local"] for row in ours) == ["10.0.0.2", "fd00::2", "fd01::2"]
    assert not any(row.get("tentative") for row in ours)


@pytest.mark.root
def test_routes_of_two_interfaces(namespace: str) -> None:
    first = Interface(
        name="eth0",
        mac=MAC,
        addresses=["10.1.0.2/24"],
        gateway="10.1.0.1",
        routes=[
            Route(destination="10.4.0.0/16", gateway="10.1.0.9"),
            Route(destination="10.5.0.0/16"),
            Route(destination="10.6.0.1/32", gateway="192.168.9.9"),
        ],
    )
    second = Interface(name="net1", mac=MAC_2, addresses=["10.2.0.2/24"], gateway="10.2.0.1")
    assert configure_in(namespace, first, second) == ""
    expected = [
        ("default", "10.1.0.1", "eth0"),  # the first one is in use, and stays so
        ("default", "10.2.0.1", "net1"),
        ("10.4.0.0/16", "10.1.0.9", "eth0"),
        ("10.5.0.0/16", "", "eth0"),
        ("10.6.0.1", "192.168.9.9", "eth0"),
    ]
    assert routes(namespace) == expected
    assert configure_in(namespace, second) == ""  # what is not named stays
    assert routes(namespace) == expected
    moved = Interface(
        mac=MAC,
        addresses=["10.1.0.3/24"],
        gateway="10.1.0.77",
        routes=[Route(destination="10.5.0.0/16", gateway="10.1.0.9")],
    )
    assert configure_in(namespace, moved) == ""
    assert routes(namespace) == [
        ("default", "10.1.0.77", "eth0"),
        ("default", "10.2.0.1", "net1"),
        ("10.4.0.0/16", "10.1.0.9", "eth0"),
        ("10.5.0.0/16", "10.1.0.9", "eth0"),
        ("10.6.0.1", "192.168.9.9", "eth0"),
    ]
    link = shown(namespace, "address", "show", "eth0")[0]
    found = [row["local"] for row in link["addr_info"] if row["family"] == "inet"]
    assert sorted(found) == ["10.1.0.2", "10.1.0.3"]
    kernels = shown(namespace, "route", "show", "proto", "kernel")
    # With routes of its own eth0 has no other ones.
    assert {row["dst"] for row in kernels} == {"10.2.0.0/24"}


@pytest.mark.root
def test_ipv6_routes_of_two_interfaces_do_not_become_one(namespace: str) -> None:
    first = Interface(name="eth0", mac=MAC, addresses=["fd01::2/64"], gateway="fd01::1")
    second = Interface(name="net1", mac=MAC_2, addresses=["fd02::2/64"], gateway="fd02::1")
    for pair in ((first, second), (first,), (second,)):
        assert configure_in(namespace, *pair) == ""
        assert routes(namespace, "-6") == [
            ("default", "fd01::1", "eth0"),
            ("default", "fd02::1", "net1"),
        ]
    on_link = Interface(mac=MAC, routes=[Route(destination="::/0")])
    assert configure_in(namespace, on_link) == ""
    assert routes(namespace, "-6") == [("default", "", "eth0"), ("default", "fd02::1", "net1")]


@pytest.mark.root
def test_a_default_route_may_stand_among_the_routes(namespace: str) -> None:
    on_link = Interface(
        name="eth0",
        mac=MAC,
        addresses=["10.1.0.2/24"],
        routes=[
            Route(destination="0.0.0.0/0"),
            Route(destination="::/0", gateway="fe80::1"),
            Route(destination="10.1.0.0/24"),
        ],
    )
    for _ in range(2):
        assert configure_in(namespace, on_link) == ""
        assert ("default", "", "eth0") in routes(namespace)
        assert ("default", "fe80::1", "eth0") in routes(namespace, "-6")


@pytest.mark.root
def test_routes_are_all_there_are_and_neighbours_are_fixed(namespace: str) -> None:
    """As a CNI plugin leaves a namespace: no route to the prefix, a gateway that answers no ARP."""
    interface = Interface(
        name="eth0",
        mac=MAC,
        addresses=["10.1.2.3/24", "10.9.9.9/32", "fd00:1::3/64"],
        gateway="10.1.2.1",
        routes=[
            Route(destination="10.1.2.1/32", source="10.1.2.3"),
            Route(destination="10.1.2.0/24", gateway="10.1.2.1"),
            Route(destination="10.4.0.0/16", gateway="169.254.1.1", metric=70, mtu=1300),
            Route(destination="fd00:1::/64", metric=256),
            Route(destination="::/0", gateway="fe80::1"),
            Route(destination="10.5.0.0/16", gateway="fe80::2"),
        ],
        neighbours=[
            Neighbour(address="169.254.1.1", mac="02:00:00:00:00:FE"),
            Neighbour(address="fe80::1", mac="02:00:00:00:00:fd"),
        ],
    )
    assert configure_in(namespace, interface) == ""
    assert configure_in(namespace, interface) == ""  # again
    keys = ("dst", "gateway", "prefsrc", "metric", "via")
    found = [
        tuple(
            str(row[key])
            for key in keys
            if key in row and (key, row["dst"]) != ("metric", "default")
        )
        for row in shown(namespace, "route", "show", "dev", "eth0")
    ]
    assert sorted(found) == [
        ("10.1.2.0/24", "10.1.2.1"),
        ("10.1.2.1", "10.1.2.3"),
        ("10.4.0.0/16", "169.254.1.1", "70"),
        ("10.5.0.0/16", "{'family': 'inet6', 'host': 'fe80::2'}"),
        ("default", "10.1.2.1"),
    ]
    assert shown(namespace, "route", "get", "10.4.0.1")[0]["dev"] == "eth0"
    assert "mtu 1300" in run("ip", "-n", namespace, "route", "show", "10.4.0.0/16")
    found6 = {
        row["dst"]: row.get("gateway")
        for row in shown(namespace, "-6", "route", "show", "dev", "eth0")
        if not row["dst"].startswith("fe80::")
    }
    assert found6 == {"fd00:1::/64": None, "default": "fe80::1"}
    flags = shown(namespace, "-6", "address", "show", "dev", "eth0", "scope", "global")
    assert "tentative" not in flags[0]["addr_info"][0]
    neighbours = shown(namespace, "neighbour", "show", "dev", "eth0", "nud", "permanent")
    assert sorted((row["dst"], row["lladdr"]) for row in neighbours) == [
        ("169.254.1.1", "02:00:00:00:00:fe"),
        ("fe80::1", "02:00:00:00:00:fd"),
    ]


@pytest.mark.root
def test_names_change_in_a_circle(namespace: str) -> None:
    pair = [Interface(name="eth0", mac=MAC), Interface(name="eth1", mac=MAC_2)]
    assert configure_in(namespace, *pair) == ""
    pair[0].name, pair[1].name = pair[1].name, pair[0].name
    assert configure_in(namespace, *pair) == ""
    links = {row["ifname"]: row["address"] for row in shown(namespace, "link", "show")}
    assert (links["eth1"], links["eth0"]) == (MAC, MAC_2)
    assert configure_in(namespace, Interface(name="eth0", mac=MAC)) == (
        "rename eth1 to eth0: File exists"  # who is not named keeps its name
    )


@pytest.mark.root
def test_the_kernels_refusal_is_a_sentence(namespace: str) -> None:
    text = configure_in(namespace, Interface(mac=MAC, name="eth0", mtu=1 << 30))
    assert text == "set MTU 1073741824 of eth0: Invalid argument"
    assert configure_in(namespace, Interface(mac=MAC, name="far")) == (
        "rename eth0 to far: File exists"
    )
    crooked = Interface(mac=MAC, routes=[Route(destination="10.4.0.1/16")])
    assert configure_in(namespace, crooked) == (
        "renew routes to 10.4.0.1/16 on eth0: Invalid argument"
    )
    missing = [Interface(mac=MAC, mtu=1300), Interface(mac="02:00:00:00:99:99")]
    assert configure_in(namespace, *missing) == ("no interface has MAC address '02:00:00:00:99:99'")
    assert shown(namespace, "link", "show", "eth0")[0]["mtu"] != 1300  # nothing was begun


@pytest.mark.parametrize(
    ("interface", "words"),
    [
        (Interface(mac=MAC, addresses=["10.0.0.1"]), "no prefix length"),
        (Interface(mac=MAC, addresses=["10.0.0.1/33"]), "no prefix length"),
        (Interface(mac=MAC, addresses=["fd00::1/129"]), "no prefix length"),
        (Interface(mac=MAC, addresses=["10.0.0.1/" + "0" * 5000]), "no prefix length"),
        (Interface(mac=MAC, addresses=["10.0.0/8"]), "no IP address"),
        (Interface(mac=MAC, addresses=["\0/8"]), "no IP address"),
        (Interface(mac=MAC, addresses=["10.0.0.1/8"] * 65), "65 addresses and 0 routes"),
        (Interface(mac=MAC, gateway="here"), "no IP address"),
        (Interface(mac=MAC, name="../x"), "interface name"),
        (Interface(mac=MAC, name="x" * 16), "interface name"),
        (Interface(mac=MAC, routes=[Route(destination="default")]), "no IP address"),
        (Interface(mac=MAC, routes=[Route(destination="10.0.0.0/8", gateway="x")]), "no IP addr"),
        (Interface(mac=MAC, routes=[Route(destination="::/0", gateway="1.1.1.1")]), "other IP fam"),
        (Interface(mac=MAC, routes=[Route(destination="::/0")] * (MAX_ROUTES + 1)), "257 routes"),
        (Interface(mac=MAC, routes=[Route(destination="::/0", source="1.1.1.1")]), "other IP fam"),
        (Interface(mac=MAC, neighbours=[Neighbour(address="::1", mac="02")]), "no MAC address"),
        (Interface(mac=MAC, neighbours=[Neighbour(address="x")]), "no IP address"),
        (Interface(mac=MAC, neighbours=[Neighbour()] * (MAX_NEIGHBOURS + 1)), "257 neighbours"),
    ],
)
def test_a_request_that_cannot_be(interface: Interface, words: str) -> None:
    with pytest.raises(CallerError, match=words):
        plan([interface])


@pytest.mark.parametrize(
    ("interfaces", "words"),
    [
        ([Interface(mac=MAC)] * 2, "the same MAC address"),
        ([Interface(mac=MAC, name="a"), Interface(mac=MAC_2, name="a")], "the same name"),
        ([Interface(mac=MAC)] * (MAX_INTERFACES + 1), "17 interfaces"),
    ],
)
def test_interfaces_that_cannot_be_together(interfaces: list[Interface], words: str) -> None:
    with pytest.raises(CallerError, match=words):
        plan(interfaces)


@pytest.mark.parametrize("mac", ["02:00:00:00:99:99", "", "x" * 5000])
def test_a_device_that_is_not_there(mac: str) -> None:
    with pytest.raises(CallerError, match="no interface has MAC") as error:
        configure(plan([Interface(mac=mac, name="eth7")]))
    assert error.value.code == "not_found"


@given(
    st.lists(
        st.builds(
            lambda mac, name, mtu, addresses, gateway, routes: Interface(
                mac=mac,
                name=name,
                mtu=mtu,
                addresses=addresses,
                gateway=gateway,
                routes=[Route(destination=a, gateway=b) for a, b in routes],
            ),
            st.sampled_from(["", MAC, MAC_2]),
            st.text(max_size=4),
            st.integers(0, (1 << 32) - 1),
            st.lists(_TEXT := st.sampled_from(["", "/", "10.0.0.1/8", "::/", "::1/64", "a/b"])),
            st.sampled_from(["", "10.0.0.1", "::1", "x"]),
            st.lists(st.tuples(_TEXT, st.text(max_size=4))),
        ),
        max_size=3,
    )
)
def test_any_interfaces_are_planned_or_refused(interfaces: list[Interface]) -> None:
    with contextlib.suppress(CallerError):
        for row in plan(interfaces):
            for address, length in row.addresses:
                netlink.add_address(1, address, length)
            for route in row.routes:
                netlink.add_route(1, *route.network, gateway=route.gateway)


def test_pid_1_imports_nothing_heavy() -> None:
    """Boot time is import time: what must stay out, and third parties' modules."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'guest-agent'), str(ROOT / 'protos')]!r}\n"
        "import vmcell_agent.__main__\n"
        "print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    heavy = {"asyncio", "subprocess", "logging", "inspect", "dataclasses", "threading", "h11"}
    assert not loaded & heavy
    assert "typing" not in loaded  # see vmcell_agent.record
    later = {"windows", "holder", "renewal", "readout", "oom", "freezer", "limits"}
    later |= {"snapshot", "identity", "readdress"}
    assert not loaded & {f"vmcell_agent.{name}" for name in later}
    assert not any(name.startswith("vmcell_agent.envd") for name in loaded)
