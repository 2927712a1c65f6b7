"""A sandbox as noded knows it, and the same thing as labels on its container.

The labels are the only record: noded that starts anew reads them back. `state` says how far a
create came; everything but `running` is removed at the next start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vmcell_api.egress import OPEN, Egress
from vmcell_api.volumes.names import MAX_MOUNTS, VolumeMount
from vmcell_protos.errors import HostError

PREFIX = "io.vmcell."
SANDBOX_LABEL = PREFIX + "sandbox"
STATE_LABEL = PREFIX + "state"
END_LABEL = PREFIX + "end-at"
STARTED_LABEL = PREFIX + "started-at"
INTERNET_LABEL = PREFIX + "internet"
ALLOW_LABEL = PREFIX + "allow-out"
DENY_LABEL = PREFIX + "deny-out"
VOLUME_LABEL = PREFIX + "volume-"
CREATING, RUNNING = "creating", "running"


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Times are unix milliseconds; `slot_number` is that of the network slot."""

    sandbox_id: str
    template_id: str
    image: str
    vcpus: int
    memory_mib: int
    slot_number: int
    egress: Egress = OPEN
    address: str
    started_at_unix_ms: int = 0
    end_at_unix_ms: int = 0
    volume_mounts: tuple[VolumeMount, ...] = ()

    def labels(self, state: str) -> dict[str, str]:
        """What `from_labels` reads back; containerd allows 4096 bytes for a key and its value."""
        return {
            SANDBOX_LABEL: self.sandbox_id,
            STATE_LABEL: state,
            PREFIX + "template": self.template_id,
            PREFIX + "vcpus": str(self.vcpus),
            PREFIX + "memory-mib": str(self.memory_mib),
            PREFIX + "slot": str(self.slot_number),
            **egress_labels(self.egress),
            PREFIX + "address": self.address,
            STARTED_LABEL: str(self.started_at_unix_ms),
            END_LABEL: str(self.end_at_unix_ms),
            **{
                f"{VOLUME_LABEL}{number}": f"{mount.volume_id} {mount.name} {mount.path}"
                for number, mount in enumerate(self.volume_mounts)
            },
        }

    def reaching(self, egress: Egress) -> Sandbox:
        """The same sandbox with other rules."""
        return replace(self, egress=egress)

    def ending_at(self, end_at_unix_ms: int) -> Sandbox:
        """The same sandbox with another deadline."""
        return replace(self, end_at_unix_ms=end_at_unix_ms)


def egress_labels(egress: Egress) -> dict[str, str]:
    """The labels that hold the rules."""
    return {
        INTERNET_LABEL: "yes" if egress.allow_internet else "no",
        ALLOW_LABEL: ",".join(egress.allow_out),
        DENY_LABEL: ",".join(egress.deny_out),
    }


def _egress(labels: dict[str, str]) -> Egress:
    """The rules in `labels`; an earlier version wrote no lists."""
    return Egress(
        allow_internet=labels[INTERNET_LABEL] == "yes",
        allow_out=tuple(filter(None, labels.get(ALLOW_LABEL, "").split(","))),
        deny_out=tuple(filter(None, labels.get(DENY_LABEL, "").split(","))),
    )


def from_labels(labels: dict[str, str], image: str) -> Sandbox:
    """The sandbox that `labels` describe; raises HostError when noded did not write them."""
    try:
        return Sandbox(
            sandbox_id=labels[SANDBOX_LABEL],
            template_id=labels[PREFIX + "template"],
            image=image,
            vcpus=int(labels[PREFIX + "vcpus"]),
            memory_mib=int(labels[PREFIX + "memory-mib"]),
            slot_number=int(labels[PREFIX + "slot"]),
            egress=_egress(labels),
            address=labels[PREFIX + "address"],
            started_at_unix_ms=int(labels[STARTED_LABEL]),
            end_at_unix_ms=int(labels[END_LABEL]),
            volume_mounts=tuple(_volume_mounts(labels)),
        )
    except (KeyError, ValueError) as error:
        raise HostError(f"container labels {labels} are not noded's: {error}") from error


def _volume_mounts(labels: dict[str, str]) -> Iterator[VolumeMount]:
    """One label for each, numbered from 0."""
    for number in range(MAX_MOUNTS):
        row = labels.get(f"{VOLUME_LABEL}{number}")
        if row is None:
            return
        volume_id, name, path = row.split(" ", 2)
        yield VolumeMount(volume_id=volume_id, name=name, path=path)


def unix_ms_now() -> int:
    """The wall clock in milliseconds."""
    return time.time_ns() // 1_000_000
