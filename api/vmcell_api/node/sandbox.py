"""A sandbox as noded knows it, and the same thing as labels on its container.

The labels are the only record: noded that starts anew reads them back. `state` says how far the
sandbox came:

    creating   removed at the next start
    running    there is a task; nothing else is lost when it is gone
    pausing    being saved: noded that starts anew lets it run on
    parked     nobody's yet; removed at the next start
    paused     `snapshot-id` is all there is of it, a task that is still there is ended

A rollback makes a second container for the same sandbox, of the next `generation`; once that one is
`running`, the first is removed.
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
TIMEOUT_LABEL = PREFIX + "timeout-ms"
SNAPSHOT_LABEL = PREFIX + "snapshot-id"
SLOT_LABEL = PREFIX + "slot"
ADDRESS_LABEL = PREFIX + "address"
GENERATION_LABEL = PREFIX + "generation"
ON_TIMEOUT_LABEL = PREFIX + "on-timeout"
ON_REQUEST_LABEL = PREFIX + "on-request"
CREATING, RUNNING, PAUSING, PAUSED = "creating", "running", "pausing", "paused"
PARKED = "parked"


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Times are unix milliseconds; `slot_number` is that of the network slot it has or had.

    `container` is containerd's id of it; `snapshot_id` what a paused one is resumed by.
    `timeout_ms` is what it was given at first, and again when a request resumes it.
    """

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
    container_id: str = ""  # "": as the sandbox
    generation: int = 0
    state: str = RUNNING
    snapshot_id: str = ""
    timeout_ms: int = 0
    pause_on_timeout: bool = False
    auto_resume: bool = False

    @property
    def container(self) -> str:
        """The id of its container."""
        return self.container_id or self.sandbox_id

    @property
    def is_running(self) -> bool:
        """Whether requests reach it."""
        return self.state == RUNNING

    def labels(self, state: str) -> dict[str, str]:
        """What `from_labels` reads back; containerd allows 4096 bytes for a key and its value."""
        return {
            SANDBOX_LABEL: self.sandbox_id,
            STATE_LABEL: state,
            PREFIX + "template": self.template_id,
            PREFIX + "vcpus": str(self.vcpus),
            PREFIX + "memory-mib": str(self.memory_mib),
            SLOT_LABEL: str(self.slot_number),
            **egress_labels(self.egress),
            ADDRESS_LABEL: self.address,
            STARTED_LABEL: str(self.started_at_unix_ms),
            END_LABEL: str(self.end_at_unix_ms),
            GENERATION_LABEL: str(self.generation),
            SNAPSHOT_LABEL: self.snapshot_id,
            TIMEOUT_LABEL: str(self.timeout_ms),
            ON_TIMEOUT_LABEL: "pause" if self.pause_on_timeout else "kill",
            ON_REQUEST_LABEL: "resume" if self.auto_resume else "refuse",
            **{
                f"{VOLUME_LABEL}{number}": f"{mount.volume_id} {mount.name} {mount.path}"
                for number, mount in enumerate(self.volume_mounts)
            },
        }

    def reaching(self, egress: Egress) -> Sandbox:
        """The same sandbox with other rules."""
        return replace(self, egress=egress)

    def in_state(self, state: str, *, snapshot_id: str = "") -> Sandbox:
        """The same sandbox in another state."""
        return replace(self, state=state, snapshot_id=snapshot_id)

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


def from_labels(labels: dict[str, str], image: str, container_id: str = "") -> Sandbox:
    """The sandbox that `labels` describe; raises HostError when noded did not write them.

    An earlier version wrote fewer of them.
    """
    try:
        return Sandbox(
            sandbox_id=labels[SANDBOX_LABEL],
            template_id=labels[PREFIX + "template"],
            image=image,
            vcpus=int(labels[PREFIX + "vcpus"]),
            memory_mib=int(labels[PREFIX + "memory-mib"]),
            slot_number=int(labels[SLOT_LABEL]),
            egress=_egress(labels),
            address=labels[ADDRESS_LABEL],
            started_at_unix_ms=int(labels[STARTED_LABEL]),
            end_at_unix_ms=int(labels[END_LABEL]),
            volume_mounts=tuple(_volume_mounts(labels)),
            container_id="" if container_id == labels[SANDBOX_LABEL] else container_id,
            generation=int(labels.get(GENERATION_LABEL, "0")),
            state=labels[STATE_LABEL],
            snapshot_id=labels.get(SNAPSHOT_LABEL, ""),
            timeout_ms=int(labels.get(TIMEOUT_LABEL, "0")),
            pause_on_timeout=labels.get(ON_TIMEOUT_LABEL) == "pause",
            auto_resume=labels.get(ON_REQUEST_LABEL) == "resume",
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
