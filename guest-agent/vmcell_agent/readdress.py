"""An interface that is to become another one: a restored guest has those of the guest it was.

Taking a link down makes the kernel forget its routes, its IPv6 addresses and all its neighbours,
the permanent ones too (fib_disable_ip, addrconf_ifdown, neigh_ifdown). IPv4 addresses stay and are
taken off one by one.
"""

from __future__ import annotations

import errno
import socket

from vmcell_agent.attempt import attempt
from vmcell_protos import rtnetlink as netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Send = Callable[[bytes, str, tuple[int, ...]], int]  # network.Routes.send

_ANSWER_BYTES = 32 << 10  # the kernel fills dumps into buffers of at most this size
_GONE = (errno.EADDRNOTAVAIL,)  # with the last primary address of a prefix go its secondary ones


def strip(send: Send, index: int, name: str) -> None:
    """Take the interface down and everything off it; raises HostError."""
    send(netlink.set_link_down(index), f"take {name} down", ())
    for request in _addresses(index, name):
        send(request, f"take the addresses off {name}", _GONE)


def set_mac(send: Send, index: int, name: str, mac: str) -> None:
    """Another MAC address for an interface that is down; raises HostError."""
    request = netlink.set_mac(index, bytes.fromhex(mac.replace(":", "")))
    send(request, f"give MAC address {mac} to {name}", ())


def _addresses(index: int, name: str) -> list[bytes]:
    """A request for each address, that removes it."""
    requests: list[bytes] = []
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with (
        attempt(f"list the addresses of {name}"),
        socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as connection,
    ):
        connection.send(netlink.list_addresses())
        while True:
            for kind, _, body in netlink.messages(connection.recv(_ANSWER_BYTES)):
                if kind == netlink.NLMSG_DONE:
                    return requests
                if kind == netlink.NLMSG_ERROR:
                    number = -netlink.I32.unpack_from(body)[0]
                    raise OSError(number, errno.errorcode.get(number, "unknown error"))
                if kind == netlink.RTM_NEWADDR and netlink.IFADDRMSG.unpack_from(body)[4] == index:
                    requests.append(netlink.delete_address(body))
