"""What a transport and its queues are made of between two instructions of the guest; no I/O.

Buffers that a device has taken and not used are counted as not taken: our devices use them in the
order of the ring, so whoever goes on finds them there again.
"""

from __future__ import annotations

from typing import NamedTuple


class QueueState(NamedTuple):
    """A queue's registers, and where in its rings its device stands."""

    size: int
    ready: bool
    descriptor_gpa: int
    driver_gpa: int
    device_gpa: int
    next_avail: int
    used_index: int


class TransportState(NamedTuple):
    """One window. `config` is the device's configuration space when it was saved, `own` what the
    device itself remembers, as numbers by name."""

    device_id: int
    config: bytes
    status: int
    device_features_select: int
    driver_features_select: int
    driver_features: int
    queue_select: int
    config_generation: int
    interrupt_status: int
    queues: tuple[QueueState, ...]
    own: dict[str, int]
