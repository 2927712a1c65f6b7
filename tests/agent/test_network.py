"""Interfaces configured in a network namespace of the test's own, read back with ip(8)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from agent_harness import ROOT, run

from vmcell_agent.network import configure, plan
from vmcell_protos.agent import Interface, Neighbour, Route
from vmcell_protos.errors import CallerError

MAC = "02:00:00:00:00:07"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with one interface of address MAC, its peer up."""
    name = f"vmcell-agent-{os.getpid()}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "add", "raw0", "address", MAC, "type", "veth", "peer", "far")
        run("ip", "-n", name, "link", "set", "far", "up")
        yield name
    finally:
        run("ip", "netns", "delete", name)


def configure_in(namespace: str, interface: Interface) -> str:
    """Run `configure` inside; the error's sentence, "" for none."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'guest-agent'), str(ROOT / 'protos')]!r}\n"
        "from vmcell_agent.network import configure, loopback_up, plan\n"
        "from vmcell_protos.agent import Interface\n"
        "from vmcell_protos.errors import VmcellError\n"
        "loopback_up()\n"
        f"try: configure(plan([Interface.decode({interface.encode()!r})]))\n"
        "except VmcellError as error: print(error)\n"
    )
    return run("ip", "netns", "exec", namespace, sys.executable, "-I", "-S", "-B", "-c", code)


def shown(namespace: str, *words: str) -> Any:
    return json.loads(run("ip", "-json", "-n", namespace, *words))


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


@pytest.mark.root
def test_ipv6(namespace: str) -> None:
    interface = Interface(name="eth0", mac=MAC, addresses=["fd00::2/64"], gateway="fd00::1")
    assert configure_in(namespace, interface) == ""
    assert shown(namespace, "-6", "route", "show", "default")[0]["gateway"] == "fd00::1"


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
        tuple(str(row[key]) for key in keys if key in row)
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
def test_the_kernels_refusal_is_a_sentence(namespace: str) -> None:
    text = configure_in(namespace, Interface(mac=MAC, name="eth0", mtu=1 << 30))
    assert text == "set MTU 1073741824 of eth0: Invalid argument"
    assert configure_in(namespace, Interface(mac=MAC, name="far")) == (
        "rename eth0 to far: File exists"
    )


@pytest.mark.parametrize(
    ("interface", "words"),
    [
        (Interface(mac="02:00:00:00:99:99"), "no interface has MAC"),
        (Interface(mac=""), "no interface has MAC"),
        (Interface(mac=MAC, addresses=["10.0.0.1"]), "no prefix length"),
        (Interface(mac=MAC, addresses=["10.0.0.1/33"]), "no prefix length"),
        (Interface(mac=MAC, addresses=["10.0.0/8"]), "no IP address"),
        (Interface(mac=MAC, gateway="here"), "no IP address"),
        (Interface(mac=MAC, routes=[Route(destination="10.0.0.0")]), "no prefix length"),
        (Interface(mac=MAC, routes=[Route(destination="::/0", gateway="a")]), "no IP address"),
        (
            Interface(mac=MAC, routes=[Route(destination="::/0", source="1.1.1.1")]),
            "other IP family",
        ),
        (Interface(mac=MAC, neighbours=[Neighbour(address="::1", mac="02")]), "no MAC address"),
        (Interface(mac=MAC, neighbours=[Neighbour(address="x")]), "no IP address"),
        (Interface(mac=MAC, name="../x"), "interface name"),
    ],
)
def test_a_request_that_cannot_be(interface: Interface, words: str) -> None:
    with pytest.raises(CallerError, match=words):
        configure(plan([interface]))


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
    assert not any(name.startswith("vmcell_agent.envd") for name in loaded)
