"""What a virtio device is: the face every device shows its transport, and what it gets from it.

Threads: `activate` and `reset` run on the vCPU thread that wrote the status register, everything
else on the event loop's thread, and all of it under the transport's one lock. So a device needs no
lock of its own, but in `activate` and `reset` it reaches the loop by `call_soon` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, Protocol

from vmcell_protos.errors import CallerError
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

    def process_soon(self, queue_index: int) -> None:
        """Has `process` called for this queue at the loop's next turn; not for `in_kernel` ones."""

    def config_changed(self) -> None:
        """Tells the driver that the configuration space has changed (§ 2.5); under no lock."""


class Activation(NamedTuple):
    """What a driver and its device agreed on, frozen at DRIVER_OK.

    `notify_fds` are the eventfds of notifications, one for each queue if the device is `in_kernel`,
    else one in all; they stay the transport's.
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
        """The configuration space."""

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

    def write_config(self, offset: int, data: bytes) -> bool:
        """The driver wrote `data` at `offset`; False if there is no such field to write."""

    def queue_count(self, features: int) -> int:
        """How many queues, counted from the first, a driver with these features sets up."""

    def remembered(self) -> dict[str, int]:
        """What a successor must know beside the queues, as numbers below 2**64 by name."""

    def remember(self, own: dict[str, int]) -> None:
        """Takes over from a predecessor; CallerError if that cannot have been one."""

    def suspend(self) -> tuple[tuple[int, int], ...] | None:
        """Nothing of the device touches guest memory any more: (next to take, next to give back) of
        each queue of the activation, None if they are where their `position` is."""

    def proceed(self) -> None:
        """The opposite of `suspend`."""

    def tell_restored(self) -> None:
        """An activation was taken over from another process: what it was connected to is gone."""


class PlainDevice:
    """What a device is that says nothing else: worked on by the event loop alone, with a
    configuration nobody writes, all of its queues always, no memory of its own, and nothing on the
    host to let go of."""

    in_kernel = False
    queue_sizes: tuple[int, ...] = ()
    _activation: Activation | None  # set to None by whoever makes one

    def activate(self, activation: Activation) -> None:
        self._activation = activation

    def reset(self) -> None:
        self._activation = None

    def close(self) -> None:
        self._activation = None

    def write_config(self, offset: int, data: bytes) -> bool:
        return False

    def queue_count(self, features: int) -> int:
        return len(self.queue_sizes)

    def remembered(self) -> dict[str, int]:
        return {}

    def remember(self, own: dict[str, int]) -> None:
        if own:
            raise CallerError(f"the saved device remembers {sorted(own)}, this one nothing")

    def suspend(self) -> tuple[tuple[int, int], ...] | None:
        return None

    def proceed(self) -> None:
        return

    def tell_restored(self) -> None:
        return
