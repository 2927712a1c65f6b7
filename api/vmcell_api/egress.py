"""Which addresses a sandbox may reach, as E2B's `network` says it: pure rules, no I/O.

Sources: E2B's API reference of `allowOut` and `denyOut`: an allowed address beats a denied one, and
`allow_internet_access: false` denies 0.0.0.0/0. IPv6 is not routed at all, so an IPv6 entry may be
denied and not allowed. Addresses that are never the internet stay closed whatever the rules say;
to allow nothing but such is refused, because it would have no effect.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vmcell_protos.errors import CallerError

MAX_RULES = 100
# A container's label holds 4096 bytes with its name.
MAX_LIST_LENGTH = 4000
# IANA's special-purpose registry (RFC 6890): nothing of it is the internet. 100.64/10 and
# 169.254/16 hold the metadata services of clouds.
CLOSED_RANGES = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15"),
    *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
)
_ENTRY = re.compile(r"[0-9a-fA-F.:]{2,45}(/[0-9]{1,3})?")
_CLOSED = tuple(ipaddress.IPv4Network(text) for text in CLOSED_RANGES)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, kw_only=True)
class Egress:
    """The rules of one sandbox; entries are the caller's own words, made by `checked_egress`."""

    allow_internet: bool = True
    allow_out: tuple[str, ...] = ()
    deny_out: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether no rule closes anything."""
        return self.allow_internet and not self.denied()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is open."""
        return not self.allow_internet and not self.allow_out

    def allowed(self) -> list[ipaddress.IPv4Network]:
        """The IPv4 networks of `allow_out`, ascending, without overlaps."""
        return _ipv4(self.allow_out)

    def denied(self) -> list[ipaddress.IPv4Network]:
        """The IPv4 networks of `deny_out`, ascending, without overlaps."""
        return _ipv4(self.deny_out)

    def permits(self, address: str) -> bool:
        """Whether these rules let a packet to `address` (IPv4) pass."""
        target = ipaddress.IPv4Address(address)
        if any(target in network for network in self.allowed()):
            return True
        return self.allow_internet and not any(target in network for network in self.denied())


OPEN = Egress()
CLOSED = Egress(allow_internet=False)


def checked_egress(
    *,
    allow_internet: bool,
    allow_out: Sequence[str],
    deny_out: Sequence[str],
    prefix: str = "",
) -> Egress:
    """The rules, each entry checked; `prefix` goes before a field's name in the refusal.

    Raises CallerError that names field, entry and what the field takes.
    """
    for name, entries in (("allowOut", allow_out), ("denyOut", deny_out)):
        field = prefix + name
        if len(entries) > MAX_RULES or len(",".join(entries)) > MAX_LIST_LENGTH:
            raise CallerError(
                f"{field} has {len(entries)} entries; at most {MAX_RULES} of together "
                f"{MAX_LIST_LENGTH} characters"
            )
        for entry in entries:
            network = _parsed(entry, field)
            if name == "allowOut":
                _check_allowed(network, entry, field)
    return Egress(
        allow_internet=allow_internet, allow_out=tuple(allow_out), deny_out=tuple(deny_out)
    )


def _check_allowed(network: Network, entry: str, field: str) -> None:
    if network.version == 6:
        raise CallerError(f"{field} names {entry!r}, but sandboxes have no IPv6; leave it out")
    if any(network.subnet_of(closed) for closed in _CLOSED):
        raise CallerError(
            f"{field} names {entry!r}, but private and special addresses stay closed to sandboxes; "
            "leave it out"
        )


def _parsed(entry: str, field: str) -> Network:
    try:
        if not _ENTRY.fullmatch(entry):  # no IPv6 scope, which may hold anything
            raise ValueError("no address")
        # Host bits may be set, as Go's ParseCIDR takes them.
        return ipaddress.ip_network(entry, strict=False)
    except ValueError as error:
        raise CallerError(
            f"{field} names {entry[:80]!r}, which is no IP address and no CIDR block; "
            "this server does not have rules by domain name"
        ) from error


def _ipv4(entries: Iterable[str]) -> list[ipaddress.IPv4Network]:
    networks = (ipaddress.ip_network(entry, strict=False) for entry in entries)
    only = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    return list(ipaddress.collapse_addresses(only))
