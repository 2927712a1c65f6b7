"""rtnetlink messages: requests for the kernel out, its messages in. No I/O.

The shim and the guest's PID 1 both speak it. Source: rtnetlink(7), netlink(7), <linux/netlink.h>,
<linux/rtnetlink.h>, <linux/if_link.h>, <linux/if_addr.h>, <linux/neighbour.h>.
"""

from __future__ import annotations

import socket
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 1, 4, 0x10
NLM_F_ACK_TLVS, NLMSGERR_ATTR_MSG = 0x200, 1
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP = 0x300
NLA_TYPE_MASK = 0x3FFF
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_AF_SPEC = 1, 3, 4, 26
IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 8, 1
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 2, 0x200
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 6, 7, 8
RTA_VIA, RTAX_MTU = 18, 2
NDA_DST, NDA_LLADDR = 1, 2
NUD_PERMANENT = 0x80
IFF_UP = 1
RT_TABLE_MAIN, RTPROT_BOOT, RTN_UNSPEC, RTN_UNICAST, RTNH_F_ONLINK = 254, 3, 0, 1, 4
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255

NLMSGHDR = Struct("=IHHII")  # length, type, flags, sequence, port
IFINFOMSG = Struct("=BxHiII")  # family, type, index, flags, change
IFADDRMSG = Struct("=BBBBI")  # family, prefix length, flags, scope, index
RTMSG = Struct("=BBBBBBBBI")  # family, dst len, src len, tos, table, protocol, scope, type, flags
NDMSG = Struct("=BxxxiHBB")  # family, index, state, flags, type
RTATTR = Struct("=HH")  # length, type
U16 = Struct("=H")
U32 = Struct("=I")
I32 = Struct("=i")


def attribute(kind: int, *parts: bytes) -> bytes:
    """One attribute; its payload is `parts` joined, padded as the next one needs it."""
    payload = b"".join(parts)
    length = RTATTR.size + len(payload)
    return RTATTR.pack(length, kind) + payload + bytes(-length % 4)


def message(kind: int, flags: int, body: bytes) -> bytes:
    """One request that the kernel acknowledges; its sequence number is 1."""
    length = NLMSGHDR.size + len(body)
    return NLMSGHDR.pack(length, kind, NLM_F_REQUEST | NLM_F_ACK | flags, 1, 0) + body


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# ---- requests ---------------------------------------------------------------------------------


def set_link(index: int, *, name: str = "", mtu: int = 0, up: bool = False) -> bytes:
    """RTM_NEWLINK: rename, set the MTU (0: leave), bring up. A rename needs the link down."""
    flags = IFF_UP if up else 0
    body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, flags, flags)
    if name:
        body += attribute(IFLA_IFNAME, name.encode() + b"\0")
    if mtu:
        body += attribute(IFLA_MTU, U32.pack(mtu))
    return message(RTM_NEWLINK, 0, body)


def set_link_down(index: int) -> bytes:
    """RTM_NEWLINK; the kernel forgets routes by the link and its neighbours."""
    return message(RTM_NEWLINK, 0, IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, IFF_UP))


def set_mac(index: int, mac: bytes) -> bytes:
    """RTM_NEWLINK: another hardware address."""
    body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(IFLA_ADDRESS, mac)
    return message(RTM_NEWLINK, 0, body)


def without_link_local(index: int) -> bytes:
    """RTM_NEWLINK: a link that is about to come up gets no IPv6 address of its own."""
    mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))
    body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    body += attribute(IFLA_AF_SPEC, attribute(socket.AF_INET6, mode))
    return message(RTM_NEWLINK, 0, body)


def delete_link(index: int) -> bytes:
    """RTM_DELLINK."""
    return message(RTM_DELLINK, 0, IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0))


def add_address(
    index: int, address: str, prefix_length: int, *, prefix_route: bool = True
) -> bytes:
    """RTM_NEWADDR; an address that is there already is replaced.

    With `prefix_route` the kernel adds a route to the prefix. Duplicate address detection is left
    out: whoever gave the address away has done it, and it would hold the address back a second.
    """
    family = family_of(address)
    packed = socket.inet_pton(family, address)
    flags = IFA_F_NODAD if family == socket.AF_INET6 else 0
    if not prefix_route:
        flags |= IFA_F_NOPREFIXROUTE
    body = IFADDRMSG.pack(family, prefix_length, 0, RT_SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    body += attribute(IFA_FLAGS, U32.pack(flags))
    return message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def list_addresses() -> bytes:
    """RTM_GETADDR of all interfaces: answered by a RTM_NEWADDR for each, then NLMSG_DONE."""
    body = bytes(IFADDRMSG.size)
    length = NLMSGHDR.size + len(body)
    return NLMSGHDR.pack(length, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body


def delete_address(row: bytes) -> bytes:
    """RTM_DELADDR of the address that the RTM_NEWADDR with the body `row` tells of; raises
    ValueError."""
    found = attributes(row[IFADDRMSG.size :])
    body = row[: IFADDRMSG.size]
    for kind in (IFA_LOCAL, IFA_ADDRESS):
        if kind in found:
            body += attribute(kind, found[kind])
    return message(RTM_DELADDR, 0, body)


def add_route(
    index: int,
    destination: str,
    prefix_length: int,
    *,
    gateway: str = "",
    source: str = "",
    metric: int = 0,
    mtu: int = 0,
) -> bytes:
    """RTM_NEWROUTE of the main table, beside those there are; EEXIST for one that is there.

    A gateway counts as on the link, whatever the prefix (a /31 peer, a /32), and may be of IPv6
    for an IPv4 destination (RFC 5549); without one the whole network is on the link. Empty or 0 for
    the rest: the kernel's choice.
    """
    family = family_of(destination)
    scope = RT_SCOPE_UNIVERSE if gateway or family == socket.AF_INET6 else RT_SCOPE_LINK
    flags = RTNH_F_ONLINK if gateway else 0
    body = _route(index, destination, prefix_length, scope, RTN_UNICAST, flags)
    if gateway:
        through = family_of(gateway)
        packed = socket.inet_pton(through, gateway)
        if through == family:
            body += attribute(RTA_GATEWAY, packed)
        else:
            body += attribute(RTA_VIA, U16.pack(through), packed)
    if source:
        body += attribute(RTA_PREFSRC, socket.inet_pton(family, source))
    if metric:
        body += attribute(RTA_PRIORITY, U32.pack(metric))
    if mtu:
        body += attribute(RTA_METRICS, attribute(RTAX_MTU, U32.pack(mtu)))
    return message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, body)


def delete_route(index: int, destination: str, prefix_length: int) -> bytes:
    """RTM_DELROUTE of one route to that network by that interface, whatever its gateway, that
    `add_route` has made; not those that the kernel keeps for addresses. ESRCH: there is none."""
    body = _route(index, destination, prefix_length, RT_SCOPE_NOWHERE, RTN_UNSPEC, 0)
    return message(RTM_DELROUTE, 0, body)


def _route(
    index: int, destination: str, prefix_length: int, scope: int, kind: int, flags: int
) -> bytes:
    family = family_of(destination)
    body = RTMSG.pack(family, prefix_length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, kind, flags)
    body += attribute(RTA_OIF, U32.pack(index))
    if prefix_length:
        body += attribute(RTA_DST, socket.inet_pton(family, destination))
    return body


def add_neighbour(index: int, address: str, mac: bytes) -> bytes:
    """RTM_NEWNEIGH: the address is at `mac` for good; one that is there is replaced."""
    family = family_of(address)
    body = NDMSG.pack(family, index, NUD_PERMANENT, 0, 0)
    body += attribute(NDA_DST, socket.inet_pton(family, address)) + attribute(NDA_LLADDR, mac)
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


# ---- what the kernel says ---------------------------------------------------------------------


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, flags, body) of each message in one datagram; ValueError where it makes no sense."""
    position = 0
    while position < len(data):
        if len(data) - position < NLMSGHDR.size:
            raise ValueError(f"netlink answer ends with {len(data) - position} stray bytes")
        length, kind, flags, _, _ = NLMSGHDR.unpack_from(data, position)
        if not NLMSGHDR.size <= length <= len(data) - position:
            raise ValueError(f"netlink answer has a message of {length} bytes at {position}")
        yield kind, flags, data[position + NLMSGHDR.size : position + length]
        position += length + -length % 4


def attributes(data: bytes) -> dict[int, bytes]:
    """Payload by type (without the flag bits); the last of a kind wins. Raises ValueError."""
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        if len(data) - position < RTATTR.size:
            raise ValueError(f"netlink attributes end with {len(data) - position} stray bytes")
        length, kind = RTATTR.unpack_from(data, position)
        if not RTATTR.size <= length <= len(data) - position:
            raise ValueError(f"netlink attribute {kind} has {length} bytes at {position}")
        found[kind & NLA_TYPE_MASK] = data[position + RTATTR.size : position + length]
        position += length + -length % 4
    return found


def error_number(answer: bytes) -> int:
    """errno of the acknowledgement, 0 for success; raises ValueError for anything else."""
    for kind, _, body in messages(answer):
        if kind == NLMSG_ERROR and len(body) >= I32.size:
            return -int(I32.unpack_from(body)[0])
        break
    raise ValueError("netlink answer is no acknowledgement")


def error_text(answer: bytes) -> str:
    """What the kernel adds to an errno, "" for nothing; of a socket with NETLINK_CAP_ACK and
    NETLINK_EXT_ACK on. Raises ValueError."""
    for kind, flags, body in messages(answer):
        if kind == NLMSG_ERROR and flags & NLM_F_ACK_TLVS:
            told = attributes(body[I32.size + NLMSGHDR.size :])
            return told.get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode("ascii", "replace")
        break
    return ""
