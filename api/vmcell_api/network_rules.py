"""E2B's `network` objects, from JSON to checked rules; what cannot be enforced is refused by name.

Sources: E2B's `NewSandbox.network` and `PUT /sandboxes/{id}/network`. cubesandbox spells one field
`allowInternetAccess` and sends `rules` as a list.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmcell_api.egress import OPEN, Egress, checked_egress
from vmcell_api.json_body import bool_field, text_list_field
from vmcell_protos.errors import CallerError

# They need a proxy that looks into connections, or a name server of ours.
UNSUPPORTED = ("dnsServers", "egressProxy", "maskRequestHost", "httpsPorts", "rules")


@dataclass(frozen=True, kw_only=True)
class NetworkWish:
    """What a create asks of the network; `is_public` False: callers need a traffic token."""

    egress: Egress = OPEN
    is_public: bool = True


ANY_NETWORK = NetworkWish()


def parse_network(body: dict[str, object]) -> NetworkWish:
    """`network` and `allow_internet_access` of a create; raises CallerError."""
    network = body.get("network")
    if network is None:
        network = {}
    if not isinstance(network, dict):
        raise CallerError("network takes an object")
    _refuse_unsupported(network, "network.")
    egress = _egress(network, "network.", allow_internet=allow_internet(body))
    is_public = bool_field(network, "allowPublicTraffic", default=True, prefix="network.")
    return NetworkWish(egress=egress, is_public=is_public)


def parse_network_update(body: dict[str, object]) -> Egress:
    """The body of `PUT …/network`: it replaces every rule, so what is left out is open again."""
    _refuse_unsupported(body, "")
    if body.get("allowPublicTraffic") is not None:
        raise CallerError("allowPublicTraffic is set at create and cannot be changed; leave it out")
    return _egress(body, "", allow_internet=allow_internet(body))


def allow_internet(body: dict[str, object]) -> bool:
    """`allow_internet_access` in both spellings; raises CallerError when they disagree."""
    camel = bool_field(body, "allowInternetAccess", default=True)
    snake = bool_field(body, "allow_internet_access", default=camel)
    if body.get("allowInternetAccess") is not None and snake != camel:
        raise CallerError("allow_internet_access and allowInternetAccess disagree; send one")
    return snake


def _egress(network: dict[str, object], prefix: str, *, allow_internet: bool) -> Egress:
    return checked_egress(
        allow_internet=allow_internet,
        allow_out=text_list_field(network, "allowOut", prefix=prefix),
        deny_out=text_list_field(network, "denyOut", prefix=prefix),
        prefix=prefix,
    )


def _refuse_unsupported(network: dict[str, object], prefix: str) -> None:
    wanted = [prefix + name for name in UNSUPPORTED if network.get(name)]
    if wanted:
        raise CallerError(f"this server does not have {', '.join(wanted)}; leave it out")
