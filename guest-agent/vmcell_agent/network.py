"""The guest's interfaces as the host wants them: name, MTU, addresses, default route.

A device is found by its MAC address, which is the host's own name for it; interfaces that are not
named are left alone.
"""

from __future__ import annotations

import os
import re
import socket

from vmcell_agent import netlink
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import Interface

_SYS_CLASS_NET = "/sys/class/net"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
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
    addresses = [_parse_address(text) for text in interface.addresses]
    if interface.gateway:
        _check_address(interface.gateway, f"gateway {interface.gateway!r}")
    if interface.name and not _NAME.fullmatch(interface.name):
        raise CallerError(f"interface name {interface.name!r} is none of Linux's")
    current, index = _find(interface.mac)
    name = interface.name or current
    with Routes() as routes:
        if name != current:
            routes.send(netlink.set_link(index, name=name), f"rename {current} to {name}")
        if interface.mtu:
            text = f"set MTU {interface.mtu} of {name}"
            routes.send(netlink.set_link(index, mtu=interface.mtu), text)
        for address, prefix_length in addresses:
            request = netlink.add_address(index, address, prefix_length)
            routes.send(request, f"give {address}/{prefix_length} to {name}")
        routes.send(netlink.set_link(index, up=True), f"bring up {name}")
        if interface.gateway:
            request = netlink.add_default_route(index, interface.gateway)
            routes.send(request, f"route by {interface.gateway} on {name}")


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


def _parse_address(text: str) -> tuple[str, int]:
    """ "10.88.0.3/31" → ("10.88.0.3", 31)."""
    address, _, length = text.partition("/")
    _check_address(address, f"address {text!r}")
    longest = 128 if ":" in address else 32
    if not length.isascii() or not length.isdigit() or int(length) > longest:
        raise CallerError(f"address {text!r} has no prefix length of 0 to {longest}")
    return address, int(length)
