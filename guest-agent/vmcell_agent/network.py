"""The guest's interfaces as the host wants them: name, MTU, addresses, routes, fixed neighbours.

A device is found by its MAC address, which is the host's own name for it; interfaces that are not
named are left alone.
"""

from __future__ import annotations

import os
import re
import socket

from vmcell_agent.attempt import attempt
from vmcell_protos import rtnetlink as netlink
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import Interface, Neighbour, Route

_SYS_CLASS_NET = "/sys/class/net"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
_ANSWER_BYTES = 16384


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

    def send(self, request: bytes, what: str) -> None:
        """Raises HostError "<what>: <reason>"."""
        with attempt(what):
            self._socket.send(request)
            number = netlink.error_number(self._socket.recv(_ANSWER_BYTES))
            if number:
                raise OSError(number, os.strerror(number))


def loopback_up() -> None:
    with Routes() as routes:
        routes.send(netlink.set_link(socket.if_nametoindex("lo"), up=True), "bring up lo")


def configure(interface: Interface) -> None:
    """Bring one interface up as asked; raises CallerError or HostError."""
    addresses = [_parse_address(text, "address") for text in interface.addresses]
    routes = [_parse_route(route) for route in interface.routes]
    neighbours = [_parse_neighbour(neighbour) for neighbour in interface.neighbours]
    if interface.gateway:
        _check_address(interface.gateway, f"gateway {interface.gateway!r}")
    if interface.name and not _NAME.fullmatch(interface.name):
        raise CallerError(f"interface name {interface.name!r} is none of Linux's")
    current, index = _find(interface.mac)
    name = interface.name or current
    with Routes() as kernel:
        if name != current:
            kernel.send(netlink.set_link(index, name=name), f"rename {current} to {name}")
        if interface.mtu:
            text = f"set MTU {interface.mtu} of {name}"
            kernel.send(netlink.set_link(index, mtu=interface.mtu), text)
        for address, length in addresses:
            request = netlink.add_address(index, address, length, prefix_route=not routes)
            kernel.send(request, f"give {address}/{length} to {name}")
        kernel.send(netlink.set_link(index, up=True), f"bring up {name}")
        for address, mac in neighbours:
            request = netlink.add_neighbour(index, address, mac)
            kernel.send(request, f"note that {address} is at {mac.hex(':')} on {name}")
        for route, (destination, length) in routes:
            request = netlink.add_route(
                index,
                destination,
                length,
                gateway=route.gateway,
                source=route.source,
                metric=route.metric,
                mtu=route.mtu,
            )
            by = f" by {route.gateway}" if route.gateway else ""
            kernel.send(request, f"route {route.destination}{by} on {name}")
        if interface.gateway:
            request = netlink.add_default_route(index, interface.gateway)
            kernel.send(request, f"route by {interface.gateway} on {name}")


def _find(mac: str) -> tuple[str, int]:
    wanted = mac.lower()
    for name in sorted(os.listdir(_SYS_CLASS_NET)):
        try:
            fd = os.open(f"{_SYS_CLASS_NET}/{name}/address", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not a device, or gone meanwhile
            continue
        try:
            found = os.read(fd, 64).decode("ascii", "replace").strip()
        finally:
            os.close(fd)
        if found == wanted and wanted:
            return name, socket.if_nametoindex(name)
    raise CallerError(f"no interface has MAC address {mac!r}", code="not_found")


def _check_address(text: str, what: str) -> None:
    try:
        socket.inet_pton(netlink.family_of(text), text)
    except (OSError, ValueError) as error:
        raise CallerError(f"{what} is no IP address") from error


def _parse_address(text: str, what: str) -> tuple[str, int]:
    """ "10.88.0.3/31" → ("10.88.0.3", 31)."""
    address, _, length = text.partition("/")
    _check_address(address, f"{what} {text!r}")
    longest = 128 if ":" in address else 32
    if not length.isascii() or not length.isdigit() or int(length) > longest:
        raise CallerError(f"{what} {text!r} has no prefix length of 0 to {longest}")
    return address, int(length)


def _parse_route(route: Route) -> tuple[Route, tuple[str, int]]:
    """The route with its destination taken apart; its other addresses are addresses."""
    destination = _parse_address(route.destination, "route to")
    if route.gateway:
        _check_address(route.gateway, f"route to {route.destination}: gateway {route.gateway!r}")
    if route.source:
        _check_address(route.source, f"route to {route.destination}: source {route.source!r}")
        if netlink.family_of(route.source) != netlink.family_of(destination[0]):
            raise CallerError(
                f"route to {route.destination}: source {route.source!r} is of the other family"
            )
    return route, destination


def _parse_neighbour(neighbour: Neighbour) -> tuple[str, bytes]:
    """The address and the 6 bytes of its MAC address."""
    _check_address(neighbour.address, f"neighbour {neighbour.address!r}")
    mac = neighbour.mac.lower()
    if not _MAC.fullmatch(mac):
        raise CallerError(f"neighbour {neighbour.address}: {neighbour.mac!r} is no MAC address")
    return neighbour.address, bytes.fromhex(mac.replace(":", ""))
