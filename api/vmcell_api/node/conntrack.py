"""Ending the connections of a sandbox that has ended.

The forward chain lets replies in. Without this the peers of one sandbox could go on talking to the
next one in its slot, for as long as they keep the kernel's entries alive, and nginx would send it
what was on its way to the last. A machine that is gone says no FIN: nginx would wait for hours.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Collection, Iterator
from typing import Any

from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttr, NFCTAttrTuple

from vmcell_protos.errors import HostError

ENOENT = 2
SS_TIMEOUT_S = 30


class _SameTuple(NFCTAttr):
    """The original direction of a dumped entry, whatever its protocol."""

    def __init__(self, entry: Any) -> None:
        self._attrs = entry.get_attr("CTA_TUPLE_ORIG")["attrs"]

    def attrs(self) -> list[object]:
        return [[name, value] for name, value, *_ in self._attrs]


def forget(address: str) -> None:
    """Deletes every entry that `address` (IPv4) opened or that was opened to it.

    Raises HostError.
    """
    with _conntrack(f"forget the connections of {address}") as netlink:
        for end in ("saddr", "daddr"):
            for entry in list(netlink.dump(tuple_orig=NFCTAttrTuple(**{end: address}))):
                if _end(entry, end) == address:  # kernels before 5.8 do not filter
                    _delete(netlink, entry)


def forget_all(addresses: Collection[str]) -> None:
    """`forget` for all of `addresses`, in one pass over the kernel's table."""
    with _conntrack("forget the connections of free slots") as netlink:
        for entry in list(netlink.dump()):
            if _end(entry, "saddr") in addresses or _end(entry, "daddr") in addresses:
                _delete(netlink, entry)


def forget_opened(address: str, *, unless: Callable[[str], bool]) -> None:
    """Deletes the entries that `address` (IPv4) opened to a peer that is not `unless(peer)`.

    Connections of the host to `address`, envd's among them, stay. Raises HostError.
    """
    with _conntrack(f"end the connections of {address}") as netlink:
        for entry in list(netlink.dump(tuple_orig=NFCTAttrTuple(saddr=address))):
            peer = _end(entry, "daddr")
            if _end(entry, "saddr") == address and peer is not None and not unless(peer):
                _delete(netlink, entry)


@contextlib.contextmanager
def _conntrack(what: str) -> Iterator[NFCTSocket]:
    try:
        with NFCTSocket() as netlink:
            yield netlink
    except (NetlinkError, OSError) as error:
        raise HostError(
            f"cannot {what} ({error}); noded needs the kernel module nf_conntrack_netlink"
        ) from error


def close_sockets(address: str) -> None:
    """Resets the host's own TCP connections to `address`; raises HostError.

    A kernel without INET_DIAG_DESTROY leaves them; the firewall's chain `output` stops them there.
    """
    try:
        subprocess.run(
            ["ss", "--kill", "--tcp", "--numeric", "dst", address],
            check=True,
            capture_output=True,
            timeout=SS_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise HostError("ss is not installed; install the package iproute2") from error
    except subprocess.SubprocessError as error:
        raise HostError(f"cannot close the connections to {address}: {error}") from error


def _end(entry: Any, end: str) -> str | None:
    """One end of an entry's first packet; None for IPv6."""
    name = "CTA_IP_V4_SRC" if end == "saddr" else "CTA_IP_V4_DST"
    address: str | None = entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_IP").get_attr(name)
    return address


def _delete(netlink: NFCTSocket, entry: Any) -> None:
    try:
        netlink.entry("del", tuple_orig=_SameTuple(entry))
    except NetlinkError as error:
        if error.code != ENOENT:  # it timed out in between
            raise
