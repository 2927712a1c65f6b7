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
RTA_OIF, RTA_GATEWAY = 4, 5
IFF_UP = 1
RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK = 254, 3, 0, 1, 4

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
    """RTM_NEWADDR; an address that is there already is replaced."""
    family = family_of(address)
    packed = socket.inet_pton(family, address)
    body = _IFADDRMSG.pack(family, prefix_length, 0, RT_SCOPE_UNIVERSE, index)
    body += _attribute(IFA_LOCAL, packed) + _attribute(IFA_ADDRESS, packed)
    return _message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def add_default_route(index: int, gateway: str) -> bytes:
    """RTM_NEWROUTE; the gateway counts as on the link, whatever the prefix (a /31 peer, a /32)."""
    family = family_of(gateway)
    body = _RTMSG.pack(
        family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK
    )
    body += _attribute(RTA_GATEWAY, socket.inet_pton(family, gateway))
    body += _attribute(RTA_OIF, _U32.pack(index))
    return _message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body)


def error_number(answer: bytes) -> int:
    """errno of the acknowledgement, 0 for success; raises ValueError for anything else."""
    if len(answer) < _NLMSGHDR.size + _I32.size:
        raise ValueError(f"netlink answer of {len(answer)} bytes is too short")
    if _NLMSGHDR.unpack_from(answer)[1] != NLMSG_ERROR:
        raise ValueError("netlink answer is no acknowledgement")
    return -int(_I32.unpack_from(answer, _NLMSGHDR.size)[0])
