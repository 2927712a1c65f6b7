"""What rtnetlink dumps tell: links, addresses, routes, neighbours. Bytes in, rows out; no I/O.

Every parser takes the body of one message and raises ValueError for bytes that are no such row.
Source: as in `rtnetlink`, and the kernel's net/core/rtnetlink.c, net/ipv4/fib_semantics.c.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from struct import Struct

from vmcell_protos import rtnetlink as nl

IFLA_MASTER, IFLA_LINKINFO, IFLA_INFO_KIND = 10, 18, 1
IFF_LOOPBACK, IFF_NOARP = 0x8, 0x80
ARPHRD_ETHER = 1
RTA_MULTIPATH, RTA_TABLE = 9, 15
RTM_F_CLONED = 0x200

# Length of the fixed header by the type of dump; the kernel wants it whole, zeros mean "all".
_REQUEST_HEADERS = {
    nl.RTM_GETLINK: nl.IFINFOMSG,
    nl.RTM_GETADDR: nl.IFADDRMSG,
    nl.RTM_GETROUTE: nl.RTMSG,
    nl.RTM_GETNEIGH: nl.NDMSG,
}


@dataclass(frozen=True)
class Link:
    """One interface. `mac` is "" when it has none of 6 bytes, `kind` "" for hardware; `master` is
    the index of the bridge or bond it belongs to, 0 for none."""

    index: int
    name: str
    mac: str
    mtu: int
    flags: int
    hardware: int
    kind: str
    master: int


@dataclass(frozen=True)
class Address:
    """One address of the interface `index`."""

    index: int
    address: str
    prefix_length: int


@dataclass(frozen=True)
class Route:
    """One route; `index` 0 when it has no interface or several. Empty or 0: not given."""

    index: int
    table: int
    kind: int
    flags: int
    destination: str
    prefix_length: int
    gateway: str
    source: str
    metric: int
    mtu: int
    several_hops: bool


@dataclass(frozen=True)
class Neighbour:
    """One entry of the neighbour table; `mac` is "" when it is not known."""

    index: int
    state: int
    address: str
    mac: str


def dump(kind: int) -> bytes:
    """The request for everything of one RTM_GET* type, of all families."""
    body = bytes(_REQUEST_HEADERS[kind].size)
    flags = nl.NLM_F_REQUEST | nl.NLM_F_DUMP
    return nl.NLMSGHDR.pack(nl.NLMSGHDR.size + len(body), kind, flags, 1, 0) + body


def parse_link(body: bytes) -> Link:
    """RTM_NEWLINK."""
    (_, hardware, index, flags, _), found = _split(nl.IFINFOMSG, body)
    info = nl.attributes(found.get(IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=_text(found.get(nl.IFLA_IFNAME, b"")),
        mac=_mac(found.get(nl.IFLA_ADDRESS, b"")),
        mtu=_number(found, nl.IFLA_MTU),
        flags=flags,
        hardware=hardware,
        kind=_text(info.get(IFLA_INFO_KIND, b"")),
        master=_number(found, IFLA_MASTER),
    )


def parse_address(body: bytes) -> Address | None:
    """RTM_NEWADDR; None for a family that is not IP."""
    (family, prefix_length, _, _, index), found = _split(nl.IFADDRMSG, body)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    # IFA_ADDRESS is the peer's on a point-to-point link, and the only one IPv6 gives.
    packed = found.get(nl.IFA_LOCAL) or found.get(nl.IFA_ADDRESS, b"")
    return Address(index, _ip(family, packed), prefix_length)


def parse_route(body: bytes) -> Route | None:
    """RTM_NEWROUTE; None for a family that is not IP."""
    header, found = _split(nl.RTMSG, body)
    family, prefix_length, _, _, table, _, _, kind, flags = header
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    anywhere = bytes(16 if family == socket.AF_INET6 else 4)
    metrics = nl.attributes(found.get(nl.RTA_METRICS, b""))
    return Route(
        index=_number(found, nl.RTA_OIF),
        table=_number(found, RTA_TABLE) or table,
        kind=kind,
        flags=flags,
        destination=_ip(family, found.get(nl.RTA_DST, anywhere)),
        prefix_length=prefix_length,
        gateway=_gateway(family, found),
        source=_ip(family, found[nl.RTA_PREFSRC]) if nl.RTA_PREFSRC in found else "",
        metric=_number(found, nl.RTA_PRIORITY),
        mtu=_number(metrics, nl.RTAX_MTU),
        several_hops=RTA_MULTIPATH in found,
    )


def parse_neighbour(body: bytes) -> Neighbour | None:
    """RTM_NEWNEIGH; None for a family that is not IP."""
    (family, index, state, _, _), found = _split(nl.NDMSG, body)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    address = _ip(family, found.get(nl.NDA_DST, b""))
    return Neighbour(index, state, address, _mac(found.get(nl.NDA_LLADDR, b"")))


def _split(header: Struct, body: bytes) -> tuple[tuple[int, ...], dict[int, bytes]]:
    if len(body) < header.size:
        raise ValueError(f"netlink message of {len(body)} bytes is too short")
    return header.unpack_from(body), nl.attributes(body[header.size :])


def _number(found: dict[int, bytes], kind: int) -> int:
    payload = found.get(kind)
    if payload is None:
        return 0
    if len(payload) != nl.U32.size:
        raise ValueError(f"netlink attribute {kind} has {len(payload)} bytes, not 4")
    return int(nl.U32.unpack(payload)[0])


def _text(payload: bytes) -> str:
    return payload.split(b"\0")[0].decode("ascii", "backslashreplace")


def _mac(payload: bytes) -> str:
    return payload.hex(":") if len(payload) == 6 else ""


def _ip(family: int, packed: bytes) -> str:
    return socket.inet_ntop(family, packed)


def _gateway(family: int, found: dict[int, bytes]) -> str:
    if nl.RTA_GATEWAY in found:
        return _ip(family, found[nl.RTA_GATEWAY])
    via = found.get(nl.RTA_VIA, b"")
    if len(via) < nl.U16.size:
        return ""
    through = int(nl.U16.unpack_from(via)[0])
    if through not in (socket.AF_INET, socket.AF_INET6):
        raise ValueError(f"a gateway has address family {through}")
    return _ip(through, via[nl.U16.size :])
