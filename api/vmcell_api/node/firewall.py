"""The nftables table `inet vmcell`: what a sandbox may send, and to whom.

The table is written whole in one transaction; afterwards a sandbox's policy is one element of the
verdict map `egress`, keyed by its TAP: accept, or a chain of its own when it has rules by address.
Sandbox to sandbox, to the host, to private ranges and to metadata addresses is closed whatever the
map says; a slot that the map does not name is closed. The name servers of the node's settings may
be private: on port 53 the sandbox's own policy alone decides.
Written and applied as libnftables JSON (libnftables-json(5)).
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from vmcell_api.egress import CLOSED_RANGES, OPEN, Egress
from vmcell_api.node.slot_plan import TAP_PREFIX, Slot
from vmcell_protos.errors import HostError

TABLE = {"family": "inet", "table": "vmcell"}
NFT_TIMEOUT_S = 30

Statement = dict[str, object]


def table_commands(
    network: str,
    slots: Iterable[Slot],
    policies: Mapping[str, Egress],
    nameservers: Iterable[str],
) -> list[Statement]:
    """The commands that replace the whole table; a TAP without a policy has the internet."""
    slots = list(slots)
    return [
        {"add": {"table": {"family": "inet", "name": "vmcell"}}},
        {"delete": {"table": {"family": "inet", "name": "vmcell"}}},
        {"add": {"table": {"family": "inet", "name": "vmcell"}}},
        *_sets(slots, list(nameservers)),
        *(row for slot in slots for row in _opening(slot.tap, policies.get(slot.tap, OPEN))),
        _chain("spoofed", "prerouting", -300),
        _chain("forward", "forward", 0),
        _chain("input", "input", 0),
        _chain("output", "output", 0),
        _chain("masquerade", "postrouting", 100, kind="nat"),
        *_spoofed_rules(),
        *_forward_rules(),
        *_input_rules(),
        _output_rule(),
        *_masquerade_rules(network),
    ]


def egress_commands(tap: str, before: Egress, after: Egress) -> list[Statement]:
    """The commands that change one slot's policy, in one transaction, from `before` to `after`."""
    commands: list[Statement] = []
    if not before.is_closed:
        commands.append({"delete": {"element": {**TABLE, "name": "egress", "elem": [tap]}}})
    if _has_chain(before):
        chain = {"chain": {**TABLE, "name": _rules_chain(tap)}}
        commands += [{"flush": chain}, {"delete": chain}]
    return [*commands, *_opening(tap, after)]


def _opening(tap: str, policy: Egress) -> list[Statement]:
    """Puts `tap` into the map, with a chain of its own where `policy` has rules by address."""
    if policy.is_closed:
        return []
    verdict: Statement = {"accept": None}
    commands: list[Statement] = []
    if _has_chain(policy):
        name = _rules_chain(tap)
        verdict = {"goto": {"target": name}}
        commands = [{"add": {"chain": {**TABLE, "name": name}}}, *_policy_rules(name, policy)]
    return [*commands, _elements("egress", [[tap, verdict]])]


def _has_chain(policy: Egress) -> bool:
    return not policy.is_open and not policy.is_closed


def _rules_chain(tap: str) -> str:
    return f"rules_{tap}"


def _policy_rules(chain: str, policy: Egress) -> list[Statement]:
    """Allowed first: an allowed address beats a denied one."""
    last: Statement = {"accept": None} if policy.allow_internet else {"drop": None}
    return [
        *_to_networks(chain, policy.allowed(), {"accept": None}),
        *_to_networks(chain, policy.denied(), {"drop": None}),
        _rule(chain, last),
    ]


def _to_networks(
    chain: str, networks: Sequence[ipaddress.IPv4Network], verdict: Statement
) -> list[Statement]:
    if not networks:
        return []
    if networks[0].prefixlen == 0:  # every address; a set cannot say it
        return [_rule(chain, verdict)]
    ranges = [
        {"prefix": {"addr": str(row.network_address), "len": row.prefixlen}} for row in networks
    ]
    return [_rule(chain, _match(_ip("daddr"), {"set": ranges}), verdict)]


def remove_commands() -> list[Statement]:
    """The commands that remove the table, whether or not it is there."""
    name = {"family": "inet", "name": "vmcell"}
    return [{"add": {"table": name}}, {"delete": {"table": name}}]


def apply(commands: list[Statement]) -> None:
    """Runs the commands as one transaction; raises HostError with nft's own words."""
    if not commands:
        return
    text = json.dumps({"nftables": [{"metainfo": {"json_schema_version": 1}}, *commands]})
    try:
        done = subprocess.run(
            ["nft", "-j", "-f", "-"],
            input=text,
            capture_output=True,
            text=True,
            timeout=NFT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError("nft is not installed; install the package nftables") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"nft did not end within {NFT_TIMEOUT_S} s") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[:500]
        raise HostError(f"nft refused the rules of table inet vmcell: {words}")


def _sets(slots: list[Slot], nameservers: list[str]) -> list[Statement]:
    own = [{"concat": [slot.tap, slot.guest_mac, slot.guest_address]} for slot in slots]
    ranges = []
    for text in CLOSED_RANGES:
        address, _, length = text.partition("/")
        ranges.append({"prefix": {"addr": address, "len": int(length)}})
    return [
        _set("own", ["ifname", "ether_addr", "ipv4_addr"], own),
        _set("closed", "ipv4_addr", ranges, flags=["interval"]),
        _set("nameservers", "ipv4_addr", nameservers),
        {"add": {"map": {**TABLE, "name": "egress", "type": "ifname", "map": "verdict"}}},
    ]


def _set(
    name: str, kind: object, elements: Sequence[object], flags: list[str] | None = None
) -> Statement:
    body: dict[str, object] = {**TABLE, "name": name, "type": kind}
    if elements:
        body["elem"] = elements
    if flags:
        body["flags"] = flags
    return {"add": {"set": body}}


def _elements(name: str, elements: Sequence[object]) -> Statement:
    return {"add": {"element": {**TABLE, "name": name, "elem": elements}}}


def _chain(name: str, hook: str, priority: int, kind: str = "filter") -> Statement:
    body = {**TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}
    return {"add": {"chain": body}}


def _rule(chain: str, *expressions: Mapping[str, object]) -> Statement:
    return {"add": {"rule": {**TABLE, "chain": chain, "expr": list(expressions)}}}


def _match(left: object, right: object, operator: str = "==") -> Statement:
    return {"match": {"op": operator, "left": left, "right": right}}


def _from_sandbox() -> Statement:
    return _match({"meta": {"key": "iifname"}}, f"{TAP_PREFIX}*")


def _to_sandbox(operator: str = "==") -> Statement:
    return _match({"meta": {"key": "oifname"}}, f"{TAP_PREFIX}*", operator)


def _ip(field: str, protocol: str = "ip") -> dict[str, object]:
    return {"payload": {"protocol": protocol, "field": field}}


_DROP: Statement = {"drop": None}
_ACCEPT: Statement = {"accept": None}
_REPLY = _match({"ct": {"key": "state"}}, ["established", "related"], "in")


def _spoofed_rules() -> list[Statement]:
    """A frame must carry the MAC and the IPv4 address of its slot; IPv6 is not routed."""
    sender = {"concat": [{"meta": {"key": "iifname"}}, _ip("saddr", "ether"), _ip("saddr")]}
    return [
        _rule("spoofed", _from_sandbox(), _match({"meta": {"key": "nfproto"}}, "ipv6"), _DROP),
        _rule("spoofed", _from_sandbox(), _match(sender, "@own", "!="), _DROP),
    ]


def _forward_rules() -> list[Statement]:
    verdict = {"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@egress"}}
    transport = _match({"meta": {"key": "l4proto"}}, {"set": ["tcp", "udp"]})
    to_nameserver = (
        _match(_ip("daddr"), "@nameservers"),
        transport,
        _match(_ip("dport", "th"), 53),
    )
    return [
        _rule("forward", _from_sandbox(), _to_sandbox(), _DROP),
        _rule("forward", _from_sandbox(), *to_nameserver, verdict),
        _rule("forward", _from_sandbox(), _match(_ip("daddr"), "@closed"), _DROP),
        _rule("forward", _from_sandbox(), verdict),
        _rule("forward", _from_sandbox(), _DROP),
        _rule("forward", _to_sandbox(), _REPLY, _ACCEPT),
        _rule("forward", _to_sandbox(), _DROP),
    ]


def _input_rules() -> list[Statement]:
    """The host answers a sandbox only on connections it opened itself."""
    return [
        _rule("input", _from_sandbox(), _REPLY, _ACCEPT),
        _rule("input", _from_sandbox(), _DROP),
    ]


def _output_rule() -> Statement:
    """What the host still sends on a connection of the slot's last sandbox is answered by RST."""
    flags = {"&": [_ip("flags", "tcp"), "syn"]}
    new = _match({"ct": {"key": "state"}}, "new", "in")
    reset = {"reject": {"type": "tcp reset"}}
    return _rule("output", _to_sandbox(), new, _match(flags, "syn", "!="), reset)


def _masquerade_rules(network: str) -> list[Statement]:
    address, _, length = network.partition("/")
    source = {"prefix": {"addr": address, "len": int(length)}}
    return [
        _rule("masquerade", _match(_ip("saddr"), source), _to_sandbox("!="), {"masquerade": None})
    ]
