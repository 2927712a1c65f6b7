"""The annotations under `io.vmcell.`: an allow-list, parsed once into values.

No value is a path or an argument list (reference: safety-and-limits V14): an annotation travels
with an image or a pod, so it may size a VM and name an interface, never point at the host.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from vmcell_protos.errors import CallerError
from vmcell_shim.oci_json import take
from vmcell_shim.snapshot_manifest import check_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

PREFIX = "io.vmcell."
# What the guest can run as an init by itself: E2B's data plane, and the same for builds.
INITS = ("envd", "envd-builder")
NAMES = (
    "vcpus",
    "memory-mib",
    "init",
    "snapshot",
    "net.tap",
    "net.mac",
    "net.address",
    "net.gateway",
    "net.nameservers",
)
# What a pod may say of its own VM; the others name things of the host.
POD_NAMES = ("vcpus", "memory-mib")
_TAP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


@dataclass(frozen=True, kw_only=True)
class TapNetwork:
    """The guest's eth0: a TAP of the host and the addresses the guest gives itself.

    `address` is "10.88.0.3/31" (IPv4 or IPv6), `gateway` "" for none.
    """

    tap: str
    mac: str
    address: str
    gateway: str
    nameservers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What the annotations ask for; None: not asked for. `snapshot` is an id, "" for none."""

    vcpus: int | None
    memory_mib: int | None
    init: str
    snapshot: str
    network: TapNetwork | None


def parse_annotations(spec: Json) -> Annotations:
    """The values under our prefix; raises CallerError for an unknown name or a bad value."""
    values: dict[str, str] = {}
    for key, value in take(spec, "annotations", dict, {}).items():
        if not key.startswith(PREFIX):
            continue
        name = key[len(PREFIX) :]
        if name not in NAMES:
            known = ", ".join(PREFIX + known for known in NAMES)
            raise CallerError(f"annotation {key!r} is not known; known are {known}")
        if not isinstance(value, str):
            raise CallerError(f"annotation {key} is {value!r}; it must be a string")
        values[name] = value
    init = values.get("init", "")
    if init not in ("", *INITS):
        raise CallerError(f"annotation {PREFIX}init is {init!r}; it takes {' or '.join(INITS)}")
    snapshot = values.get("snapshot", "")
    if snapshot:
        check_id(snapshot)
    return Annotations(
        vcpus=_number(values, "vcpus"),
        memory_mib=_number(values, "memory-mib"),
        init=init,
        snapshot=snapshot,
        network=_network(values),
    )


def _number(values: dict[str, str], name: str) -> int | None:
    text = values.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise CallerError(f"annotation {PREFIX}{name} is {text!r}; it takes a whole number")
    return int(text)


def _network(values: dict[str, str]) -> TapNetwork | None:
    given = [name for name in values if name.startswith("net.")]
    if not given:
        return None
    for name in ("net.tap", "net.mac", "net.address"):
        if name not in values:
            raise CallerError(
                f"annotation {PREFIX}{given[0]} comes without {PREFIX}{name}; "
                "a network needs net.tap, net.mac and net.address"
            )
    if not _TAP.fullmatch(values["net.tap"]):
        raise CallerError(
            f"annotation {PREFIX}net.tap is {values['net.tap']!r}; it takes an interface's name"
        )
    if not _MAC.fullmatch(values["net.mac"]):
        raise CallerError(
            f"annotation {PREFIX}net.mac is {values['net.mac']!r}; it takes a unicast MAC address "
            "in lower case, as 02:00:00:00:00:01"
        )
    _check_interface_address(values["net.address"])
    gateway = values.get("net.gateway", "")
    nameservers = tuple(item for item in values.get("net.nameservers", "").split(",") if item)
    for name, addresses in (
        ("gateway", [gateway] if gateway else []),
        ("nameservers", nameservers),
    ):
        for address in addresses:
            if _address_bits(address) is None:
                raise CallerError(
                    f"annotation {PREFIX}net.{name} holds {address!r}, which is no IP address"
                )
    return TapNetwork(
        tap=values["net.tap"],
        mac=values["net.mac"],
        address=values["net.address"],
        gateway=gateway,
        nameservers=nameservers,
    )


def _check_interface_address(text: str) -> None:
    address, slash, prefix = text.partition("/")
    bits = _address_bits(address)
    is_number = prefix.isascii() and prefix.isdigit() and len(prefix) <= 3
    if bits is None or not slash or not is_number or int(prefix) > bits:
        raise CallerError(
            f"annotation {PREFIX}net.address is {text!r}; it takes an address with its prefix "
            "length, as 10.88.0.3/31"
        )


def _address_bits(text: str) -> int | None:
    """32 or 128 for an IP address, None for anything else."""
    for family, bits in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return bits
    return None
