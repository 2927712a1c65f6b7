"""Names and addresses of network slots; pure arithmetic, so a slot needs no record anywhere.

Slot n has the TAP `vmc<n>` and the n-th /31 pair of the network: the host's end first, the guest's
second (RFC 3021). Pair 0 is left out: its first address is the network's own.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

TAP_PREFIX = "vmc"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place for a sandbox; addresses are IPv4 text, `number` counts from 1."""

    number: int
    tap: str
    host_address: str
    guest_address: str
    guest_mac: str
    host_mac: str


def slot_at(network: str, number: int) -> Slot:
    """Slot `number` of `network`; the caller has checked that the network is large enough."""
    host = ipaddress.IPv4Network(network)[2 * number]
    guest = host + 1
    return Slot(
        number=number,
        tap=f"{TAP_PREFIX}{number}",
        host_address=str(host),
        guest_address=str(guest),
        guest_mac=_mac(guest),
        host_mac=_mac(host),
    )


def _mac(address: ipaddress.IPv4Address) -> str:
    """A locally administered unicast address that follows from the IPv4 address."""
    return ":".join(f"{byte:02x}" for byte in b"\x02\xfc" + address.packed)
