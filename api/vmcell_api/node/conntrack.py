"""Ending the connections of a sandbox that has ended.

The forward chain lets replies in. Without this the peers of one sandbox could go on talking to the
next one in its slot, for as long as they keep the kernel's entries alive, and nginx would send it
what was on its way to the last. A machine that is gone says no FIN: nginx would wait for hours.
"""

from __future__ import annotations

import subprocess
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
    try:
        with NFCTSocket() as netlink:
            for end in ("saddr", "daddr"):
                for entry in list(netlink.dump(tuple_orig=NFCTAttrTuple(**{end: address}))):
                    if _has(entry, end, address):
                        _delete(netlink, entry)
    except (NetlinkError, OSError) as error:
        raise HostError(
            f"cannot forget the connections of {address} ({error}); noded needs the kernel module "
            "nf_conntrack_netlink"
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


def _has(entry: Any, end: str, address: str) -> bool:
    """Kernels before 5.8 do not filter."""
    name = "CTA_IP_V4_SRC" if end == "saddr" else "CTA_IP_V4_DST"
    ends = entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_IP")
    return bool(ends.get_attr(name) == address)


def _delete(netlink: NFCTSocket, entry: Any) -> None:
    try:
        netlink.entry("del", tuple_orig=_SameTuple(entry))
    except NetlinkError as error:
        if error.code != ENOENT:  # it timed out in between
            raise
