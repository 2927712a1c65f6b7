"""Restored sandboxes that wait for a create, so many per template as the settings say.

A parked one runs, in a slot, with a token that nobody knows; it is no sandbox of anybody's until
it is handed out. It gives its slot back when a create, resume or rollback finds none free, and so
does the sandbox that noded makes for a template's snapshot. noded that starts anew removes what is
parked and parks anew.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vmcell_api.egress import OPEN, Egress
from vmcell_api.identifiers import new_access_token, new_sandbox_id
from vmcell_api.node.build import MachineLife, SandboxBuilder
from vmcell_api.node.removal import Removals
from vmcell_api.node.sandbox import Sandbox
from vmcell_api.node.slot_plan import Slot
from vmcell_api.node.slots import SlotPool
from vmcell_api.node.snapshot_records import SnapshotRecord, SnapshotRecords
from vmcell_protos.errors import CallerError, HostError

log = logging.getLogger("vmcell.noded")


@dataclass(frozen=True, kw_only=True)
class Parked:
    """A sandbox that waits; `token` is what its envd asks for."""

    sandbox: Sandbox
    life: MachineLife
    token: str


class Pool:
    """Thread-safe. `sizes` maps template ids to numbers; `kill(sandbox_id)` is the node's."""

    def __init__(
        self,
        slots: SlotPool,
        *,
        builder: SandboxBuilder,
        removals: Removals,
        snapshots: SnapshotRecords,
        sizes: Mapping[str, int],
        kill: Callable[[str], None],
    ) -> None:
        self._slots = slots
        self._builder = builder
        self._removals = removals
        self._snapshots = snapshots
        self._sizes = sizes
        self._kill = kill
        self._makers: set[str] = set()
        self._lock = threading.Lock()
        self._parked: dict[str, list[Parked]] = defaultdict(list)

    @property
    def count(self) -> int:
        """How many are parked: as many slots can be had."""
        with self._lock:
            return sum(map(len, self._parked.values()))

    def claim(self, egress: Egress) -> Slot:
        """A slot, one of the pool's when no other is free; as `SlotPool.claim` otherwise."""
        try:
            return self._slots.claim(egress)
        except HostError as error:
            if error.code != "resource_exhausted" or not self.give_up_one():
                raise
        return self._slots.claim(egress)

    def take(self, snapshot_id: str) -> Parked | None:
        """One that was made of that snapshot; it is the caller's then."""
        with self._lock:
            waiting = self._parked.get(snapshot_id)
            return waiting.pop(0) if waiting else None

    def fill(self, record: SnapshotRecord) -> None:
        """Parks what is missing of a template, as far as slots are free; raises VmcellError."""
        while self._is_short(record) and self._slots.free_count:
            self._park(record)

    def _is_short(self, record: SnapshotRecord) -> bool:
        with self._lock:
            present = len(self._parked.get(record.snapshot_id, ()))
        return present < self._sizes.get(record.template_id, 0)

    def _park(self, record: SnapshotRecord) -> None:
        with self._snapshots.in_use(record.snapshot_id):
            slot, life = self._slots.claim(OPEN), MachineLife()
            sandbox_id, token = new_sandbox_id(), new_access_token()
            try:
                sandbox = self._builder.park(sandbox_id, record, slot, life, token)
            except BaseException:
                self._removals.remove(sandbox_id, slot.number)
                raise
        with self._lock:
            self._parked[record.snapshot_id].append(Parked(sandbox=sandbox, life=life, token=token))
        log.info("sandbox %s of template %s waits", sandbox_id, record.template_id)

    def give_up_one(self) -> bool:
        """Ends one, whichever, so that its slot is free; False when there is none."""
        with self._lock:
            waiting = next(filter(None, self._parked.values()), None)
            parked = waiting.pop() if waiting else None
            maker = "" if parked or not self._makers else self._makers.pop()
        if parked is not None:
            self._end(parked)
        elif maker:
            with suppress(CallerError):  # it has gone by itself
                self._kill(maker)
        return bool(parked or maker)

    @contextmanager
    def lending(self, sandbox_id: str) -> Iterator[None]:
        """Meanwhile that sandbox of noded's own may be killed for its slot."""
        with self._lock:
            self._makers.add(sandbox_id)
        try:
            yield
        finally:
            with self._lock:
                self._makers.discard(sandbox_id)

    def drop(self, snapshot_id: str) -> None:
        """Ends all that were made of that snapshot."""
        with self._lock:
            doomed = self._parked.pop(snapshot_id, [])
        for parked in doomed:
            self._end(parked)

    def drop_dead(self, container_id: str) -> None:
        """Removes the one of that container, if it is one: its machine has ended."""
        with self._lock:
            rows = [(row, waiting) for waiting in self._parked.values() for row in waiting]
            dead = [pair for pair in rows if pair[0].sandbox.container == container_id]
            for row, waiting in dead:
                waiting.remove(row)
        for row, _ in dead:
            self._end(row)

    def _end(self, parked: Parked) -> None:
        self._removals.remove(parked.sandbox.container, parked.sandbox.slot_number)
