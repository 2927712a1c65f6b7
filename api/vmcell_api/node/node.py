"""The node: every sandbox on it, and the verbs on them.

Each sandbox has a lock; whoever holds it builds or removes. What the registry holds can be read
back from containerd at any time, and `open()` does so: noded may die at any point.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vmcell_api.egress import OPEN, Egress
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node import sandbox_files
from vmcell_api.node.build import SandboxBuilder, SandboxRequest
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.deadlines import Deadlines
from vmcell_api.node.metrics import MetricSampler
from vmcell_api.node.sandbox import (
    END_LABEL,
    RUNNING,
    SANDBOX_LABEL,
    STATE_LABEL,
    Sandbox,
    egress_labels,
    from_labels,
    unix_ms_now,
)
from vmcell_api.node.slots import SlotPool
from vmcell_api.node.teardown import LEASE_PREFIX, tear_down
from vmcell_api.node.volume_use import VolumeUse
from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_protos.pb.containerd import types_pb2

log = logging.getLogger("vmcell.noded")

# containerd does not list a task without a shim. UNKNOWN is a shim that was slow to answer: its
# sandbox ends by an event or its deadline.
ENDED = (None, types_pb2.STOPPED)
TIMED_OUT, DIED = "timed out", "ended by itself"
RETRY_S = 5.0
RECONNECT_S = 1.0


@dataclass
class _Entry:
    """A place in the registry; `sandbox` is None until it is built.

    `died` is set without the lock: it ends a build that waits for the guest.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    sandbox: Sandbox | None = None
    ended: bool = False
    died: threading.Event = field(default_factory=threading.Event)
    due_monotonic_s: float = 0.0


class Node:
    """All sandboxes of this host. Thread-safe. `open()` first, `close()` leaves them running."""

    def __init__(
        self,
        containerd: Containerd,
        slots: SlotPool,
        builder: SandboxBuilder,
        state_dir: str,
        volumes: VolumeUse,
        *,
        metrics_interval_s: float = 0,
    ) -> None:
        self.volumes = volumes
        self.containerd = containerd
        self.slots = slots
        self._builder = builder
        self._state_dir = state_dir
        self._entries: dict[str, _Entry] = {}
        self._entries_lock = threading.Lock()
        self._deadlines = Deadlines(lambda key: self._later(self._end_quietly, key, TIMED_OUT))
        # Removals that failed, by sandbox id: tried again until they succeed.
        self._retries = Deadlines(lambda key: self._later(self._remove_again, key))
        self._unfinished: dict[str, int | None] = {}
        self._metrics = MetricSampler(self.list, state_dir, interval_s=metrics_interval_s)
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="end")
        self._stop = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="exits", daemon=True)

    def open(self) -> None:
        """Settles what an earlier noded left, makes the slots, starts the threads."""
        self.volumes.open()
        self.containerd.ensure_namespace()
        self._settle()
        self._deadlines.start()
        self._retries.start()
        self._listener.start()
        self._metrics.start()

    def close(self) -> None:
        """Stops the threads; sandboxes, TAPs and the nftables table stay. Idempotent."""
        self._stop.set()
        self._metrics.stop()
        self._deadlines.stop()
        self._retries.stop()
        self._pool.shutdown(wait=True)
        self.containerd.close()
        if self._listener.is_alive():
            self._listener.join(timeout=10)

    # The verbs.

    def create(self, request: SandboxRequest) -> Sandbox:
        """Builds a sandbox; on failure everything of it is gone and the error says why."""
        image = self._builder.image_config(request.image)
        with self._new_entry(request.sandbox_id) as entry:
            self.volumes.claim(request.sandbox_id, request.volume_mounts)
            try:
                slot = self.slots.claim(request.egress)
            except BaseException:
                self.volumes.release(request.sandbox_id)
                raise
            try:
                sandbox = self._builder.build(request, image, slot, entry.died)
            except BaseException:
                self._remove(request.sandbox_id, slot.number)
                raise
            entry.sandbox = sandbox
            self._set_due(entry, sandbox_id=sandbox.sandbox_id, left_ms=request.timeout_ms)
            log.info("sandbox %s of %s runs in %s", sandbox.sandbox_id, sandbox.image, slot.tap)
            return sandbox

    def kill(self, sandbox_id: str) -> None:
        """Ends and removes a sandbox; CallerError not_found when there is none any more."""
        entry = self._entry(sandbox_id)
        with entry.lock:
            if entry.ended or entry.sandbox is None:
                raise _not_found(sandbox_id)
            self._end(entry, entry.sandbox)
            if sandbox_id in self._unfinished:
                raise HostError(
                    f"sandbox {sandbox_id} was told to end but could not be removed whole; "
                    "the node goes on trying, see noded's log"
                )

    def get(self, sandbox_id: str) -> Sandbox:
        """A running sandbox; CallerError not_found."""
        sandbox = self._entry(sandbox_id).sandbox
        if sandbox is None:
            raise _not_found(sandbox_id)
        return sandbox

    def list(self) -> list[Sandbox]:
        """The running sandboxes, oldest first."""
        with self._entries_lock:
            found = [entry.sandbox for entry in self._entries.values() if entry.sandbox]
        return sorted(found, key=lambda sandbox: (sandbox.started_at_unix_ms, sandbox.sandbox_id))

    def set_deadline(self, sandbox_id: str, timeout_ms: int, *, only_extend: bool) -> Sandbox:
        """Moves the end of a sandbox to `timeout_ms` from now; 0 ends it at once."""
        entry = self._entry(sandbox_id)
        with entry.lock:
            if entry.ended or entry.sandbox is None:
                raise _not_found(sandbox_id)
            if only_extend and time.monotonic() + timeout_ms / 1000 <= entry.due_monotonic_s:
                return entry.sandbox
            end_at = unix_ms_now() + timeout_ms
            self.containerd.set_labels(sandbox_id, {END_LABEL: str(end_at)})
            entry.sandbox = entry.sandbox.ending_at(end_at)
            self._set_due(entry, sandbox_id=sandbox_id, left_ms=timeout_ms)
            return entry.sandbox

    def set_egress(self, sandbox_id: str, egress: Egress) -> Sandbox:
        """Changes what a sandbox may reach, at once and for good; all or nothing."""
        entry = self._entry(sandbox_id)
        with entry.lock:
            if entry.ended or entry.sandbox is None:
                raise _not_found(sandbox_id)
            before, number = entry.sandbox.egress, entry.sandbox.slot_number
            self.slots.set_egress(number, egress)
            try:
                self.containerd.set_labels(sandbox_id, egress_labels(egress))
            except VmcellError:
                self.slots.set_egress(number, before)
                raise
            entry.sandbox = entry.sandbox.reaching(egress)
            return entry.sandbox

    def metrics(
        self, sandbox_ids: Sequence[str], *, start_unix_ms: int, end_unix_ms: int, newest_only: bool
    ) -> dict[str, Sequence[MetricSample]]:
        """What sandboxes used, oldest first; those that are not running are left out."""
        return self._metrics.read(
            sandbox_ids,
            start_unix_ms=start_unix_ms,
            end_unix_ms=end_unix_ms,
            newest_only=newest_only,
        )

    # The registry.

    @contextlib.contextmanager
    def _new_entry(self, sandbox_id: str) -> Iterator[_Entry]:
        """A locked new entry; it is forgotten again when the block fails."""
        entry = _Entry()
        with entry.lock:
            with self._entries_lock:
                if sandbox_id in self._entries or sandbox_id in self._unfinished:
                    raise CallerError(f"sandbox {sandbox_id} exists already", code="already_exists")
                self._entries[sandbox_id] = entry
            try:
                yield entry
            except BaseException:
                self._forget(sandbox_id, entry)
                raise

    def _entry(self, sandbox_id: str) -> _Entry:
        with self._entries_lock:
            entry = self._entries.get(sandbox_id)
        if entry is None:
            raise _not_found(sandbox_id)
        return entry

    def _forget(self, sandbox_id: str, entry: _Entry) -> None:
        entry.ended = True
        self._deadlines.cancel(sandbox_id)
        with self._entries_lock:
            self._entries.pop(sandbox_id, None)

    def _set_due(self, entry: _Entry, *, sandbox_id: str, left_ms: int) -> None:
        entry.due_monotonic_s = time.monotonic() + left_ms / 1000
        self._deadlines.set(sandbox_id, entry.due_monotonic_s)

    # Ends.

    def _later(self, call: object, *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the pool is closed: the next noded settles it
            self._pool.submit(call, *arguments)  # type: ignore[arg-type]  # any bound method

    def _end(self, entry: _Entry, sandbox: Sandbox) -> None:
        """Removes a sandbox whose entry's lock is held."""
        self._forget(sandbox.sandbox_id, entry)
        self._remove(sandbox.sandbox_id, sandbox.slot_number)

    def _end_quietly(self, sandbox_id: str, why: str) -> None:
        """Ends a sandbox that timed out or died; one that is gone already is fine."""
        try:
            entry = self._entry(sandbox_id)
        except CallerError:
            return
        if why == DIED:
            entry.died.set()
        with entry.lock:
            if entry.ended or entry.sandbox is None:
                return
            if why == TIMED_OUT and entry.due_monotonic_s > time.monotonic():
                return  # extended while this call waited for the lock
            log.info("sandbox %s %s", sandbox_id, why)
            self._end(entry, entry.sandbox)

    def _remove(self, sandbox_id: str, slot_number: int | None) -> None:
        """Tears down; a failure is logged and tried again later, because it must not be lost."""
        try:
            tear_down(
                self.containerd,
                self.slots,
                self._state_dir,
                sandbox_id=sandbox_id,
                slot_number=slot_number,
            )
        except VmcellError as error:
            log.error("sandbox %s: %s; trying again in %.0f s", sandbox_id, error, RETRY_S)
            self._unfinished[sandbox_id] = slot_number
            self._retries.set(sandbox_id, time.monotonic() + RETRY_S)
        else:
            self._unfinished.pop(sandbox_id, None)
            self.volumes.release(sandbox_id)

    def _remove_again(self, sandbox_id: str) -> None:
        if sandbox_id in self._unfinished:
            self._remove(sandbox_id, self._unfinished[sandbox_id])

    # What containerd says.

    def _settle(self) -> None:
        """Adopts running sandboxes and removes every other trace; opens the slots between."""
        states = self.containerd.task_states()
        alive: list[Sandbox] = []
        doomed: dict[str, int | None] = {}
        for container in self.containerd.containers():
            labels = dict(container.labels)
            if SANDBOX_LABEL not in labels:
                continue
            try:
                sandbox = from_labels(labels, container.image)
            except HostError as error:
                log.error("%s", error)
                doomed[container.id] = None
                continue
            self.volumes.adopt(sandbox.sandbox_id, sandbox.volume_mounts)
            running = labels[STATE_LABEL] == RUNNING and states.get(container.id) not in ENDED
            if running and sandbox.end_at_unix_ms > unix_ms_now():
                alive.append(sandbox)
            else:
                doomed[container.id] = sandbox.slot_number
        known = {sandbox.sandbox_id for sandbox in alive}
        for sandbox_id in self._traces() - known:
            doomed.setdefault(sandbox_id, None)
        taken = {sandbox.slot_number: sandbox.egress for sandbox in alive}
        for number in doomed.values():
            if number is not None:
                taken.setdefault(number, OPEN)
        self.slots.open(taken)
        for sandbox in alive:
            entry = self._entries[sandbox.sandbox_id] = _Entry(sandbox=sandbox)
            left_ms = sandbox.end_at_unix_ms - unix_ms_now()
            self._set_due(entry, sandbox_id=sandbox.sandbox_id, left_ms=left_ms)
        for sandbox_id, number in doomed.items():
            log.info("removing what an earlier noded left of sandbox %s", sandbox_id)
            self._remove(sandbox_id, number)

    def _traces(self) -> set[str]:
        """Ids of sandboxes of which a snapshot, a lease or files are there."""
        snapshots = {
            info.labels[SANDBOX_LABEL]
            for info in self.containerd.snapshots()
            if SANDBOX_LABEL in info.labels
        }
        leases = {
            lease.removeprefix(LEASE_PREFIX)
            for lease in self.containerd.lease_ids()
            if lease.startswith(LEASE_PREFIX)
        }
        return snapshots | leases | set(sandbox_files.present(self._state_dir))

    def _listen(self) -> None:
        """Ends sandboxes whose machine ended by itself; connects again for ever."""
        while not self._stop.is_set():
            try:
                for container_id in self.containerd.exits(self._stop):
                    if container_id:
                        self._later(self._end_quietly, container_id, DIED)
                    else:
                        self._check_tasks()
            except VmcellError as error:
                log.error("%s; connecting again in %.0f s", error, RECONNECT_S)
            except ValueError:
                if not self._stop.is_set():  # grpc: the channel was closed
                    raise
            self._stop.wait(RECONNECT_S)

    def _check_tasks(self) -> None:
        """Finds the sandboxes that ended while nobody listened."""
        known = [sandbox.sandbox_id for sandbox in self.list()]
        states = self.containerd.task_states()
        for sandbox_id in known:
            if states.get(sandbox_id) in ENDED:
                self._later(self._end_quietly, sandbox_id, DIED)


def _not_found(sandbox_id: str) -> CallerError:
    return CallerError(f"sandbox {sandbox_id} was not found on this node", code="not_found")
