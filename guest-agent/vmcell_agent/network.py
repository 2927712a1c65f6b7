"""The guest's interfaces as the host wants them: name, MTU, addresses, routes, fixed neighbours.

A device is found by its MAC address, which is the host's own name for it. What a call names is set
and what it leaves out stays: interfaces that are not named, addresses given before, routes to other
networks. The routes to a network replace those to the same network by the same interface. One that
has another MAC address than it is to have, in a restored guest, loses all it had.
"""

from __future__ import annotations

import errno
import os
import re
import socket

from vmcell_agent.attempt import attempt
from vmcell_agent.record import Record
from vmcell_protos import rtnetlink as netlink
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import Interface, Neighbour, Route

    Prefix = tuple[str, int]  # "10.4.0.0/16", cut

MAX_INTERFACES, MAX_ADDRESSES, MAX_ROUTES, MAX_NEIGHBOURS = 16, 64, 256, 256
_MAX_REPLACED_ROUTES = 64
_IPV4_METRIC, _IPV6_METRIC = 100, 1024
_SYS_CLASS_NET = "/sys/class/net"
_NAME = r"[A-Za-z0-9_.-]{1,15}"
_MAC = r"[0-9a-f]{2}(:[0-9a-f]{2}){5}"
_ANSWER_BYTES = 16384
_ANY: dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class RoutePlan(Record):
    """One route; "" and 0 as in agent.proto."""

    network: Prefix
    gateway: str
    source: str
    metric: int
    mtu: int


class InterfacePlan(Record):
    """What is to become of one interface; all of it is well-formed."""

    mac: str
    present_mac: str  # by which it is found, and which becomes `mac`; "": it has that already
    name: str  # "": as it is
    mtu: int  # 0: as it is
    addresses: list[Prefix]
    prefix_routes: bool  # whether the addresses' prefixes are routes of their own
    gateway: str  # "": none
    routes: list[RoutePlan]
    neighbours: list[tuple[str, bytes]]  # address, MAC address


class Routes:
    """A NETLINK_ROUTE socket; each `send` is one request and its acknowledgement."""

    def __init__(self) -> None:
        with attempt("open a netlink socket"):
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )

    def __enter__(self) -> Routes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def send(self, request: bytes, what: str, accept: tuple[int, ...] = ()) -> int:
        """Returns 0, or the errno of `accept` that the kernel answered; raises HostError
        "<what>: <reason>" for any other."""
        with attempt(what):
            self._socket.send(request)
            number = netlink.error_number(self._socket.recv(_ANSWER_BYTES))
            if number and number not in accept:
                raise OSError(number, os.strerror(number))
        return number


def loopback_up() -> None:
    with Routes() as routes:
        routes.send(netlink.set_link(socket.if_nametoindex("lo"), up=True), "bring up lo")


def plan(interfaces: list[Interface]) -> list[InterfacePlan]:
    """Judge the whole request before anything is changed; raises CallerError."""
    if len(interfaces) > MAX_INTERFACES:
        raise CallerError(f"{len(interfaces)} interfaces; at most {MAX_INTERFACES}")
    plans = [_plan(interface) for interface in interfaces]
    for what, values in (
        ("MAC address", [row.mac for row in plans]),
        ("name", [row.name for row in plans if row.name]),
    ):
        if len(set(values)) != len(values):
            raise CallerError(f"two interfaces have the same {what}: {', '.join(values)}")
    return plans


def _plan(interface: Interface) -> InterfacePlan:
    mac, present_mac = interface.mac.lower(), interface.present_mac.lower()
    if present_mac:
        _check_change(present_mac, mac)
    if interface.name and not re.fullmatch(_NAME, interface.name, re.ASCII):
        raise CallerError(f"interface name {interface.name!r} is none of Linux's")
    if len(interface.addresses) > MAX_ADDRESSES or len(interface.routes) > MAX_ROUTES:
        raise CallerError(
            f"interface {mac!r} has {len(interface.addresses)} addresses and "
            f"{len(interface.routes)} routes; at most {MAX_ADDRESSES} and {MAX_ROUTES}"
        )
    if len(interface.neighbours) > MAX_NEIGHBOURS:
        raise CallerError(
            f"interface {mac!r} has {len(interface.neighbours)} neighbours; at most "
            f"{MAX_NEIGHBOURS}"
        )
    if interface.gateway:
        _family(interface.gateway, f"gateway {interface.gateway!r}")
    return InterfacePlan(
        mac=mac,
        present_mac=present_mac,
        name=interface.name,
        mtu=interface.mtu,
        addresses=[_prefix(text, "address") for text in interface.addresses],
        prefix_routes=not interface.routes,
        gateway=interface.gateway,
        routes=[_plan_route(route) for route in interface.routes],
        neighbours=[_plan_neighbour(neighbour) for neighbour in interface.neighbours],
    )


def _check_change(present_mac: str, mac: str) -> None:
    """Raise CallerError unless the one can become the other."""
    for what, value in (("present_mac", present_mac), ("mac", mac)):
        if not re.fullmatch(_MAC, value, re.ASCII):
            raise CallerError(f"{what} of an interface is {value[:64]!r}, no MAC address")
        if int(value[:2], 16) & 1 or not value.strip("0:"):
            raise CallerError(f"{what} of an interface is {value}, which is no device's own")


def _plan_route(route: Route) -> RoutePlan:
    network = _prefix(route.destination, "route destination")
    family = netlink.family_of(network[0])
    if route.gateway:
        what = f"gateway {route.gateway!r} of route {route.destination!r}"
        # An IPv4 network may be behind an IPv6 gateway (RFC 5549), not the other way round.
        if _family(route.gateway, what) not in (family, socket.AF_INET6):
            raise CallerError(f"{what} is of the other IP family")
    if route.source:
        what = f"source {route.source!r} of route {route.destination!r}"
        if _family(route.source, what) != family:
            raise CallerError(f"{what} is of the other IP family")
    return RoutePlan(network, route.gateway, route.source, route.metric, route.mtu)


def _plan_neighbour(neighbour: Neighbour) -> tuple[str, bytes]:
    _family(neighbour.address, f"neighbour {neighbour.address!r}")
    mac = neighbour.mac.lower()
    if not re.fullmatch(_MAC, mac, re.ASCII):
        raise CallerError(f"neighbour {neighbour.address}: {neighbour.mac!r} is no MAC address")
    return neighbour.address, bytes.fromhex(mac.replace(":", ""))


def _family(text: str, what: str) -> int:
    family = netlink.family_of(text)
    try:
        socket.inet_pton(family, text)
    except (OSError, ValueError) as error:
        raise CallerError(f"{what} is no IP address") from error
    return family


def _prefix(text: str, what: str) -> Prefix:
    address, _, length = text.partition("/")
    longest = 128 if _family(address, f"{what} {text!r}") == socket.AF_INET6 else 32
    if not length.isascii() or not length.isdigit() or len(length) > 3 or int(length) > longest:
        raise CallerError(f"{what} {text!r} has no prefix length of 0 to {longest}")
    return address, int(length)


def configure(plans: list[InterfacePlan]) -> None:
    """Bring the interfaces up as planned; raises CallerError or HostError."""
    found = _find(plans)
    indexes = [socket.if_nametoindex(name) for name in found]
    with Routes() as routes:
        for row, name, index in zip(plans, found, indexes, strict=True):
            if row.present_mac:
                from vmcell_agent import readdress  # of a restored guest only

                readdress.strip(routes.send, index, name)
                readdress.set_mac(routes.send, index, name, row.mac)
        wanted = zip(plans, found, strict=True)
        _make_way(routes, {name: row.name for row, name in wanted if row.name})
        for row, index in zip(plans, indexes, strict=True):
            _configure(routes, row, index)


def _find(plans: list[InterfacePlan]) -> list[str]:
    """Name of the interface that each of the plans means; raises CallerError."""
    devices = _devices() if plans else {}
    found = []
    for row in plans:
        # After a call that went wrong half-way it may have its new address already.
        name = devices.get(row.present_mac) or devices.get(row.mac)
        if name is None:
            mac = row.present_mac or row.mac
            raise CallerError(f"no interface has MAC address {mac!r}", code="not_found")
        if name in found:
            raise CallerError(f"two interfaces of the request are the device {name}")
        found.append(name)
    return found


def _make_way(routes: Routes, wanted: dict[str, str]) -> None:
    """Names may change in a circle (eth0 ↔ eth1): who has a name that another is to get, and will
    get one too, steps aside first."""
    for current, name in wanted.items():
        if current != name and current in wanted.values():
            index = socket.if_nametoindex(current)
            text = f"rename {current} for a moment"
            routes.send(netlink.set_link(index, name=f"aside{index}"), text)


def _configure(routes: Routes, row: InterfacePlan, index: int) -> None:
    current = socket.if_indextoname(index)
    name = row.name or current
    if name != current:
        routes.send(netlink.set_link(index, name=name), f"rename {current} to {name}")
    if row.mtu:
        routes.send(netlink.set_link(index, mtu=row.mtu), f"set MTU {row.mtu} of {name}")
    for address, length in row.addresses:
        request = netlink.add_address(index, address, length, prefix_route=row.prefix_routes)
        routes.send(request, f"give {address}/{length} to {name}")
    routes.send(netlink.set_link(index, up=True), f"bring up {name}")
    for address, mac in row.neighbours:
        request = netlink.add_neighbour(index, address, mac)
        routes.send(request, f"note that {address} is at {mac.hex(':')} on {name}")
    wanted = [*([_default_route(row.gateway, index)] if row.gateway else []), *row.routes]
    _set_routes(routes, wanted, index, name)


def _default_route(gateway: str, index: int) -> RoutePlan:
    """By `gateway`, with a metric of the interface's own: it never joins another interface's as a
    second hop (IPv6), and of two default routes the first device's is in use."""
    family = netlink.family_of(gateway)
    metric = (_IPV6_METRIC if family == socket.AF_INET6 else _IPV4_METRIC) + index
    return RoutePlan((_ANY[family], 0), gateway, "", metric, 0)


def _set_routes(routes: Routes, wanted: list[RoutePlan], index: int, name: str) -> None:
    for network, length in dict.fromkeys(route.network for route in wanted):
        old = netlink.delete_route(index, network, length)
        for _ in range(_MAX_REPLACED_ROUTES):
            if routes.send(
                old, f"renew routes to {network}/{length} on {name}", accept=(errno.ESRCH,)
            ):
                break
    for route in wanted:
        network, length = route.network
        request = netlink.add_route(
            index,
            network,
            length,
            gateway=route.gateway,
            source=route.source,
            metric=route.metric,
            mtu=route.mtu,
        )
        text = f"route {network}/{length} by {route.gateway or 'the link'} on {name}"
        routes.send(request, text, accept=(errno.EEXIST,))


def _devices() -> dict[str, str]:
    """MAC address → name; the first by name where several have one address."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(_SYS_CLASS_NET)):
        try:
            fd = os.open(f"{_SYS_CLASS_NET}/{name}/address", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not a device, or gone meanwhile
            continue
        try:
            mac = os.read(fd, 64).decode("ascii", "replace").strip()
        finally:
            os.close(fd)
        if mac:
            found.setdefault(mac, name)
    return found
