"""What a virtio device is: the face every device shows its transport, and what it gets from it.

Threads: `activate` and `reset` run on the vCPU thread that wrote the status register, everything
else on the event loop's thread, and all of it under the transport's one lock. So a device needs no
lock of its own, but in `activate` and `reset` it reaches the loop by `call_soon` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, Protocol, runtime_checkable

from vmcell_runtime.virtio.queue import Queue

P = ParamSpec("P")


class Link(Protocol):
    """A device's way back to its driver, good from one DRIVER_OK to the next reset."""

    def signal(self, *queues: Queue) -> None:
        """Publishes what is complete on these queues and interrupts the guest if it wants that."""

    def run(self, step: Callable[[], None]) -> bool:
        """Runs `step` under the device's lock; False and nothing done if this activation is over.

        A GuestError of `step` becomes DEVICE_NEEDS_RESET.
        """

    def guard(self, function: Callable[P, None]) -> Callable[P, None]:
        """`function` as the event loop may call it: each call is a `run`."""

    def config_changed(self) -> None:
        """Tells the driver that the configuration space has changed (§ 2.5); under no lock."""


class Activation(NamedTuple):
    """What a driver and its device agreed on, frozen at DRIVER_OK.

    `notify_fds` are the eventfds of the queues' notifications; they stay the transport's.
    """

    features: int
    queues: tuple[Queue, ...]
    notify_fds: tuple[int, ...]
    link: Link


class VirtioDevice(Protocol):
    """One device behind a transport. The device owns its host descriptors."""

    @property
    def device_id(self) -> int: ...

    @property
    def features(self) -> int:
        """Feature bits it offers; the transport adds VERSION_1 and EVENT_IDX."""

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        """The largest size of each queue."""

    @property
    def max_chain_bytes(self) -> int:
        """The most bytes one buffer of any of its queues may have."""

    @property
    def config(self) -> bytes:
        """The configuration space; drivers write to that of a `ConfigWriter` only."""

    @property
    def in_kernel(self) -> bool:
        """The host's kernel takes its notifications and raises its interrupts itself (vhost)."""

    def activate(self, activation: Activation) -> None:
        """The driver is ready. May raise GuestError."""

    def process(self, queue_index: int) -> bool:
        """The driver notified this queue; True asks to be called again soon (budget used up)."""

    def reset(self) -> None:
        """Forgets the activation and all work in flight; called whatever the state."""

    def close(self) -> None:
        """Releases what it owns; on the loop's thread after the loop's end, idempotent."""


@runtime_checkable
class ConfigWriter(Protocol):
    """A device with fields that its driver writes."""

    def write_config(self, offset: int, data: bytes) -> bool:
        """The driver wrote `data` at `offset`; False if there is no such field to write."""


@runtime_checkable
class FeatureQueues(Protocol):
    """A device whose last queues exist only with features the driver may leave out."""

    def queue_count(self, features: int) -> int:
        """How many queues, counted from the first, a driver with these features sets up."""


@runtime_checkable
class Remembering(Protocol):
    """A device with a memory of its own beside its queues."""

    def remembered(self) -> dict[str, int]:
        """What a successor must know, as numbers below 2**64 by name."""

    def remember(self, own: dict[str, int]) -> None:
        """Takes over from a predecessor; CallerError if that cannot have been one."""


@runtime_checkable
class KernelDriven(Protocol):
    """A device whose queues the host's kernel works on by itself, and that can be told to wait."""

    def suspend(self) -> tuple[tuple[int, int], ...]:
        """Nothing touches guest memory any more; (next to take, next to give back) of each queue
        of the activation, none without one."""

    def proceed(self) -> None:
        """The opposite of `suspend`."""


@runtime_checkable
class Reconnecting(Protocol):
    """A device whose driver must hear that what it was connected to is gone."""

    def tell_restored(self) -> None:
        """Once, after an activation was taken over from another process; under the lock."""
