"""Removing what is to go, again and again until it is gone: a failure must not be lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vmcell_api.node.containerd import Containerd
from vmcell_api.node.deadlines import Deadlines
from vmcell_api.node.slots import SlotPool
from vmcell_api.node.teardown import tear_down
from vmcell_protos.errors import VmcellError

log = logging.getLogger("vmcell.noded")

RETRY_S = 5.0


class Removals:
    """Tears containers down, by id. Thread-safe.

    `later(call)` runs a call on another thread; `gone(container_id)` is told of each that is whole
    gone.
    """

    def __init__(
        self,
        containerd: Containerd,
        slots: SlotPool,
        state_dir: str,
        *,
        later: Callable[[Callable[[], None]], None],
        gone: Callable[[str], None],
    ) -> None:
        self._containerd = containerd
        self._slots = slots
        self._state_dir = state_dir
        self._gone = gone
        # What failed: the call that tries it again.
        self._unfinished: dict[str, Callable[[], None]] = {}
        self._retries = Deadlines(lambda key: later(lambda: self._again(key)))

    def start(self) -> None:
        """Starts the thread that tries again."""
        self._retries.start()

    def stop(self) -> None:
        """Ends it; the next noded finds what is left."""
        self._retries.stop()

    def is_unfinished(self, container_id: str) -> bool:
        """Whether something of it is to go and is still there."""
        return container_id in self._unfinished

    def remove(self, container_id: str, slot_number: int | None) -> None:
        """Tears all of a container down, and frees its slot."""

        def try_it() -> None:
            tear_down(
                self._containerd,
                self._slots,
                self._state_dir,
                container_id=container_id,
                slot_number=slot_number,
            )
            self._gone(container_id)

        self.attempt(container_id, try_it)

    def attempt(self, container_id: str, call: Callable[[], None]) -> None:
        """Calls `call()` now, and later again when it raises one of our errors."""
        try:
            call()
        except VmcellError as error:
            self.try_later(container_id, call, error)
        else:
            self._unfinished.pop(container_id, None)
            self._retries.cancel(container_id)

    def try_later(self, container_id: str, call: Callable[[], None], error: VmcellError) -> None:
        """Has `call()` tried again after a while; `error` is what it failed with."""
        log.error("sandbox %s: %s; trying again in %.0f s", container_id, error, RETRY_S)
        self._unfinished[container_id] = call
        self._retries.set(container_id, time.monotonic() + RETRY_S)

    def _again(self, container_id: str) -> None:
        call = self._unfinished.get(container_id)
        if call is not None:
            self.attempt(container_id, call)
