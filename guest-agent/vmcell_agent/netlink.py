"""rtnetlink messages: bytes for the kernel out, its verdict in. No I/O.

Source: rtnetlink(7), netlink(7), <linux/rtnetlink.h>, <linux/if_link.h>, <linux/if_addr.h>.
"""

from __future__ import annotations

import socket
from struct import Struct

NLMSG_ERROR = 2
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 1, 4, 0x100, 0x400
RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE = 16, 20, 24
IFLA_IFNAME, IFLA_MTU = 3, 4
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD = 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6
IFF_UP = 1
RT_TABLE_MAIN, RTPROT_BOOT, RTN_UNICAST, RTNH_F_ONLINK = 254, 3, 1, 4
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
_IPV4_METRIC, _IPV6_METRIC = 100, 1024

_NLMSGHDR = Struct("=IHHII")  # length, type, flags, sequence, port
_IFINFOMSG = Struct("=BxHiII")  # family, type, index, flags, change
_IFADDRMSG = Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = Struct("=BBBBBBBBI")  # family, dst len, src len, tos, table, protocol, scope, type, flags
_RTATTR = Struct("=HH")  # length, type
_U32 = Struct("=I")
_I32 = Struct("=i")


def _attribute(kind: int, payload: bytes) -> bytes:
    length = _RTATTR.size + len(payload)
    return _RTATTR.pack(length, kind) + payload + bytes(-length % 4)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    length = _NLMSGHDR.size + len(body)
    return _NLMSGHDR.pack(length, kind, NLM_F_REQUEST | NLM_F_ACK | flags, 1, 0) + body


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def set_link(index: int, *, name: str = "", mtu: int = 0, up: bool = False) -> bytes:
    """RTM_NEWLINK: rename, set the MTU (0: leave), bring up. A rename needs the link down."""
    flags = IFF_UP if up else 0
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, flags, flags)
    if name:
        body += _attribute(IFLA_IFNAME, name.encode() + b"\0")
    if mtu:
        body += _attribute(IFLA_MTU, _U32.pack(mtu))
    return _message(RTM_NEWLINK, 0, body)


def add_address(index: int, address: str, prefix_length: int) -> bytes:
    """RTM_NEWADDR; an address that is there already is replaced. An IPv6 address can be used at
    once: that nobody else has it is the host's business (duplicate detection takes a second)."""
    family = family_of(address)
    packed = socket.inet_pton(family, address)
    flags = IFA_F_NODAD if family == socket.AF_INET6 else 0
    body = _IFADDRMSG.pack(family, prefix_length, flags, RT_SCOPE_UNIVERSE, index)
    body += _attribute(IFA_LOCAL, packed) + _attribute(IFA_ADDRESS, packed)
    return _message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def set_route(index: int, network: str, prefix_length: int, gateway: str) -> bytes:
    """RTM_NEWROUTE: the one route to that network by that interface. The gateway counts as on the
    link, whatever the prefix (a /31 peer, a /32); without one the whole network is on the link.

    Each interface has a metric of its own, so that a route never replaces another interface's, or
    joins it as a second hop (IPv6), and of two default routes the first device's is in use.
    """
    family = family_of(network)
    is_ipv6 = family == socket.AF_INET6
    scope = RT_SCOPE_UNIVERSE if gateway or is_ipv6 else RT_SCOPE_LINK
    body = _RTMSG.pack(
        *(family, prefix_length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST),
        RTNH_F_ONLINK if gateway else 0,
    )
    if prefix_length:
        body += _attribute(RTA_DST, socket.inet_pton(family, network))
    if gateway:
        body += _attribute(RTA_GATEWAY, socket.inet_pton(family, gateway))
    metric = (_IPV6_METRIC if is_ipv6 else _IPV4_METRIC) + index
    body += _attribute(RTA_OIF, _U32.pack(index)) + _attribute(RTA_PRIORITY, _U32.pack(metric))
    return _message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body)


def error_number(answer: bytes) -> int:
    """errno of the acknowledgement, 0 for success; raises ValueError for anything else."""
    if len(answer) < _NLMSGHDR.size + _I32.size:
        raise ValueError(f"netlink answer of {len(answer)} bytes is too short")
    if _NLMSGHDR.unpack_from(answer)[1] != NLMSG_ERROR:
        raise ValueError("netlink answer is no acknowledgement")
    return -int(_I32.unpack_from(answer, _NLMSGHDR.size)[0])
