"""The node: every sandbox on it, and the verbs on them.

What the registry holds can be read back from containerd at any time, and `open()` does so: noded
may die at any point.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from vmcell_api.egress import CLOSED, Egress
from vmcell_api.identifiers import new_access_token, new_sandbox_id
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node.build import MachineLife, SandboxBuilder, SandboxRequest
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.deadlines import Deadlines
from vmcell_api.node.file_diff import Tree, compare, read_tree
from vmcell_api.node.memory_use import ProcessMemory, read_memory
from vmcell_api.node.metrics import MetricSampler
from vmcell_api.node.pauses import Pauses
from vmcell_api.node.pool import Parked, Pool
from vmcell_api.node.registry import Entry, Registry
from vmcell_api.node.removal import Removals
from vmcell_api.node.rollbacks import Rollbacks
from vmcell_api.node.sandbox import (
    END_LABEL,
    PAUSED,
    RUNNING,
    Sandbox,
    egress_labels,
    unix_ms_now,
)
from vmcell_api.node.slot_plan import Slot
from vmcell_api.node.slots import SlotPool
from vmcell_api.node.snapshot_records import KEPT, PAUSE, UNDO, SnapshotRecord, SnapshotRecords
from vmcell_api.node.survey import ENDED, survey
from vmcell_api.node.suspension import Suspension
from vmcell_api.node.volume_use import VolumeUse
from vmcell_api.node.warm_start import WarmStart
from vmcell_api.snapshot_facts import FileChange
from vmcell_protos.errors import CallerError, HostError, VmcellError

log = logging.getLogger("vmcell.noded")

TIMED_OUT, DIED = "timed out", "ended by itself"
RECONNECT_S = 1.0
# After a pause at the deadline that failed; the sandbox runs until one succeeds.
PAUSE_AGAIN_MS = 30_000
EXPIRE_AGAIN_S = 60.0


class Node:
    """All sandboxes of this host. Thread-safe. `open()` first, `close()` leaves them running."""

    def __init__(
        self,
        containerd: Containerd,
        slots: SlotPool,
        builder: SandboxBuilder,
        state_dir: str,
        volumes: VolumeUse,
        snapshots: SnapshotRecords,
        *,
        metrics_interval_s: float = 0,
        template_snapshots: int = 0,
        pool_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.volumes = volumes
        self.containerd = containerd
        self.slots = slots
        self.snapshots = snapshots
        self._builder = builder
        self._state_dir = state_dir
        self._registry = Registry(self._end_later)
        self._removals = Removals(
            containerd, slots, state_dir, later=lambda call: self._later(call), gone=self._is_gone
        )
        self._expiries = Deadlines(lambda key: self._later(self._expire, key))
        self._suspension = Suspension(containerd, snapshots, state_dir, stands=self._stands)
        self.pool = self._new_pool(pool_sizes or {})
        self._pauses = self._new_pauses()
        self._rollbacks = self._new_rollbacks()
        self._warm = self._new_warm_start(template_snapshots)
        self._metrics = MetricSampler(self._running, state_dir, interval_s=metrics_interval_s)
        self._ends = ThreadPoolExecutor(max_workers=8, thread_name_prefix="end")
        # Pauses at the deadline take long; what has died is not to wait for them.
        self._timed = ThreadPoolExecutor(max_workers=8, thread_name_prefix="deadline")
        self._stop = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="exits", daemon=True)

    def _new_pool(self, sizes: Mapping[str, int]) -> Pool:
        return Pool(
            self.slots,
            builder=self._builder,
            removals=self._removals,
            snapshots=self.snapshots,
            sizes=sizes,
            kill=self.kill,
        )

    def _new_pauses(self) -> Pauses:
        return Pauses(
            containerd=self.containerd,
            slots=self.slots,
            registry=self._registry,
            removals=self._removals,
            builder=self._builder,
            pool=self.pool,
            snapshots=self.snapshots,
            suspension=self._suspension,
            move_deadline=self._extend,
        )

    def _new_rollbacks(self) -> Rollbacks:
        return Rollbacks(
            containerd=self.containerd,
            state_dir=self._state_dir,
            registry=self._registry,
            removals=self._removals,
            builder=self._builder,
            pool=self.pool,
            snapshots=self.snapshots,
            suspension=self._suspension,
        )

    def _new_warm_start(self, limit: int) -> WarmStart:
        return WarmStart(
            builder=self._builder,
            snapshots=self.snapshots,
            suspension=self._suspension,
            create=self._create,
            hand_out=self._hand_out,
            kill=self.kill,
            pool=self.pool,
            limit=limit,
        )

    def open(self) -> None:
        """Settles what an earlier noded left, makes the slots, starts the threads."""
        self.volumes.open()
        self.containerd.ensure_namespace()
        self.snapshots.open()
        self._settle()
        self._warm.open()
        self._registry.start()
        self._removals.start()
        self._expiries.start()
        self._listener.start()
        self._metrics.start()

    def close(self) -> None:
        """Stops the threads; sandboxes, TAPs and the nftables table stay. Idempotent."""
        self._stop.set()
        self._warm.close()
        self._metrics.stop()
        self._registry.stop()
        self._removals.stop()
        self._expiries.stop()
        self._timed.shutdown(wait=True)
        self._ends.shutdown(wait=True)
        self.containerd.close()
        if self._listener.is_alive():
            self._listener.join(timeout=10)

    # The verbs.

    def create(self, request: SandboxRequest) -> Sandbox:
        """Builds a sandbox; on failure everything of it is gone and the error says why."""
        if request.snapshot_id:
            with self.snapshots.in_use(request.snapshot_id) as record:
                _check_restorable(request, record)
                return self._create(
                    request, lambda slot, life: self._builder.restore(request, record, slot, life)
                )
        image = self._builder.image_config(request.image)
        return self._warm.restore(request, image) or self._create(
            request, lambda slot, life: self._builder.build(request, image, slot, life)
        )

    def _create(
        self, request: SandboxRequest, make: Callable[[Slot, MachineLife], Sandbox]
    ) -> Sandbox:
        if self._removals.is_unfinished(request.sandbox_id):
            raise CallerError(f"sandbox {request.sandbox_id} exists already", code="already_exists")
        with self._registry.new(request.sandbox_id) as entry:
            self.volumes.claim(request.sandbox_id, request.volume_mounts)
            try:
                slot = self.pool.claim(request.egress)
            except BaseException:
                self.volumes.release(request.sandbox_id)
                raise
            try:
                sandbox = make(slot, entry.life)
            except BaseException:
                self._removals.remove(request.sandbox_id, slot.number)
                raise
            entry.sandbox = sandbox
            self._registry.set_due(entry, sandbox_id=sandbox.sandbox_id, left_ms=request.timeout_ms)
            log.info("sandbox %s of %s runs in %s", sandbox.sandbox_id, sandbox.image, slot.tap)
            return sandbox

    def _hand_out(self, request: SandboxRequest, parked: Parked) -> Sandbox:
        """The sandbox that was parked, as the one asked for; on failure it is removed."""
        container_id, number = parked.sandbox.container, parked.sandbox.slot_number
        try:
            with self._registry.new(request.sandbox_id) as entry:
                entry.life = parked.life
                own = replace(
                    parked.sandbox, sandbox_id=request.sandbox_id, container_id=container_id
                )
                self._registry.note_container(own)  # its end is this sandbox's from now on
                self.slots.set_egress(number, request.egress)
                sandbox = self._builder.hand_out(
                    request, parked.sandbox, parked.life, token=parked.token
                )
                entry.sandbox = sandbox
                self._registry.set_due(
                    entry, sandbox_id=sandbox.sandbox_id, left_ms=request.timeout_ms
                )
        except BaseException:
            self._removals.remove(container_id, number)
            raise
        log.info("sandbox %s is what waited in %s", sandbox.sandbox_id, container_id)
        return sandbox

    def kill(self, sandbox_id: str) -> None:
        """Ends and removes a sandbox; CallerError not_found when there is none any more."""
        with self._registry.locked(sandbox_id) as (entry, sandbox):
            self._end(entry, sandbox)
            if self._removals.is_unfinished(sandbox.container):
                raise HostError(
                    f"sandbox {sandbox_id} was told to end but could not be removed whole; "
                    "the node goes on trying, see noded's log"
                )

    def get(self, sandbox_id: str) -> Sandbox:
        """A sandbox, in whatever state; CallerError not_found."""
        sandbox = self._registry.entry(sandbox_id).sandbox
        if sandbox is None:
            raise CallerError(f"sandbox {sandbox_id} was not found on this node", code="not_found")
        return sandbox

    def _running(self) -> list[Sandbox]:
        return [sandbox for sandbox in self._registry.sandboxes() if sandbox.is_running]

    def list(self) -> list[Sandbox]:
        """The sandboxes in whatever state, oldest first."""
        return self._registry.sandboxes()

    def set_deadline(self, sandbox_id: str, timeout_ms: int, *, only_extend: bool) -> Sandbox:
        """Moves the end of a running sandbox to `timeout_ms` from now; 0 ends it at once."""
        with self._registry.locked(sandbox_id, state=RUNNING) as (entry, sandbox):
            if only_extend:
                return self._extend(entry, sandbox, timeout_ms)
            return self._move_deadline(entry, sandbox, timeout_ms)

    def _extend(self, entry: Entry, sandbox: Sandbox, timeout_ms: int) -> Sandbox:
        if time.monotonic() + timeout_ms / 1000 <= entry.due_monotonic_s:
            return sandbox
        return self._move_deadline(entry, sandbox, timeout_ms)

    def _move_deadline(self, entry: Entry, sandbox: Sandbox, timeout_ms: int) -> Sandbox:
        end_at = unix_ms_now() + timeout_ms
        self.containerd.set_labels(sandbox.container, {END_LABEL: str(end_at)})
        entry.sandbox = sandbox.ending_at(end_at)
        self._registry.set_due(entry, sandbox_id=sandbox.sandbox_id, left_ms=timeout_ms)
        return entry.sandbox

    def set_egress(self, sandbox_id: str, egress: Egress) -> Sandbox:
        """Changes what a running sandbox may reach, at once and for good; all or nothing."""
        with self._registry.locked(sandbox_id, state=RUNNING) as (entry, sandbox):
            before, number = sandbox.egress, sandbox.slot_number
            self.slots.set_egress(number, egress)
            try:
                self.containerd.set_labels(sandbox.container, egress_labels(egress))
            except VmcellError:
                self.slots.set_egress(number, before)
                raise
            entry.sandbox = sandbox.reaching(egress)
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

    @property
    def saves_templates(self) -> bool:
        """Whether templates are restored at all."""
        return self._warm.is_on

    def prepare_template(self, request: SandboxRequest) -> None:
        """Boots and saves what later creates of that template restore; a failure is logged.

        The request is such a create; its id, environment, token and rules do not matter.
        """
        self._warm.prepare(request, self._builder.image_config(request.image))

    def forget_template(self, image: str) -> None:
        """Removes what creates of a template of that image restored."""
        self._warm.forget_image(image)

    def memory(self, sandbox_id: str) -> tuple[Sandbox, Sequence[ProcessMemory]]:
        """A running sandbox and what its processes have of the host's memory."""
        sandbox = self.get(sandbox_id)
        if not sandbox.is_running:
            raise CallerError(f"sandbox {sandbox_id} is {sandbox.state}", code="aborted")
        namespace = self.containerd.namespace
        return sandbox, read_memory(self._state_dir, namespace, sandbox.container)

    # What is on disk.

    def pause(self, sandbox_id: str) -> Sandbox:
        """Saves a sandbox and ends its machine; see `pauses`."""
        return self._pauses.pause(sandbox_id)

    def resume(
        self, sandbox_id: str, timeout_ms: int, *, by_request: bool = False
    ) -> tuple[Sandbox, bool]:
        """(the sandbox running, whether this call restored it); see `pauses`."""
        return self._pauses.resume(sandbox_id, timeout_ms, by_request=by_request)

    def snapshot(self, sandbox_id: str, snapshot_id: str, *, life_ms: int = 0) -> SnapshotRecord:
        """A snapshot of a running sandbox, which goes on; removed after `life_ms` unless 0."""
        with self._registry.locked(sandbox_id, state=RUNNING) as (_, sandbox):
            expires = unix_ms_now() + life_ms if life_ms else 0
            record = self._suspension.save(
                sandbox, snapshot_id, kind=KEPT, expires_at_unix_ms=expires
            )
        self._expire_later(record)
        return record

    def rollback(
        self, sandbox_id: str, snapshot_id: str, *, undo_life_ms: int
    ) -> tuple[Sandbox, SnapshotRecord]:
        """(the sandbox as the snapshot has it, what it was before); see `rollbacks`."""
        rolled, undo = self._rollbacks.rollback(sandbox_id, snapshot_id, undo_life_ms=undo_life_ms)
        self._expire_later(undo)
        return rolled, undo

    def file_changes(self, older_id: str, newer_id: str) -> Sequence[FileChange]:
        """Which files differ between two snapshots; see `file_diff`."""
        return compare(self._tree_of(older_id), self._tree_of(newer_id))

    def _tree_of(self, snapshot_id: str) -> Tree:
        """The files of a snapshot, which is restored for that, nobody's and without a network."""
        sandbox_id, token, life = new_sandbox_id(), new_access_token(), MachineLife()
        with self.snapshots.in_use(snapshot_id) as record:
            slot = self.pool.claim(CLOSED)
            try:
                sandbox = self._builder.park(sandbox_id, record, slot, life, token)
                return read_tree(sandbox.address, token if record.access_token else "")
            finally:
                self._removals.remove(sandbox_id, slot.number)

    def _expire_later(self, record: SnapshotRecord) -> None:
        if record.expires_at_unix_ms:
            left_s = (record.expires_at_unix_ms - unix_ms_now()) / 1000
            self._expiries.set(record.snapshot_id, time.monotonic() + left_s)

    def _expire(self, snapshot_id: str) -> None:
        if not self.snapshots.discard(snapshot_id):
            self._expiries.set(snapshot_id, time.monotonic() + EXPIRE_AGAIN_S)

    # Ends.

    def _later(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the pool is closed: the next noded settles it
            self._ends.submit(call, *arguments)

    def _end_later(self, sandbox_id: str) -> None:
        with contextlib.suppress(RuntimeError):  # as above
            self._timed.submit(self._end_quietly, sandbox_id, TIMED_OUT)

    def _end(self, entry: Entry, sandbox: Sandbox) -> None:
        """Removes a sandbox whose entry's lock is held, with what was kept to restore it by."""
        self._registry.forget(sandbox.sandbox_id, entry)
        slot_number = entry.stuck if sandbox.state == PAUSED else sandbox.slot_number
        self._removals.remove(sandbox.container, slot_number)
        for record in self.snapshots.records(sandbox_id=sandbox.sandbox_id):
            if record.kind in (PAUSE, UNDO):
                self._expiries.cancel(record.snapshot_id)
                self._expire(record.snapshot_id)

    def _end_quietly(self, sandbox_id: str, why: str, pid: int = 0) -> None:
        """Ends a sandbox that timed out or died; one that is gone already is fine.

        `pid` is that of the task that ended, 0 for the present one.
        """
        try:
            entry = self._registry.entry(sandbox_id)
        except CallerError:
            if why == DIED:
                self._warm.drop_dead(sandbox_id)
            return
        life = entry.life
        if why == DIED:
            if pid in entry.past_pids and pid != life.pid:
                return
            life.died.set()
        with entry.lock:
            sandbox = entry.sandbox
            if entry.ended or sandbox is None or sandbox.state == PAUSED or entry.life is not life:
                return
            if why == TIMED_OUT and entry.due_monotonic_s > time.monotonic():
                return  # extended while this call waited for the lock
            log.info("sandbox %s %s", sandbox_id, why)
            if why == TIMED_OUT and sandbox.pause_on_timeout:
                self._pause_at_deadline(entry, sandbox)
            else:
                self._end(entry, sandbox)

    def _pause_at_deadline(self, entry: Entry, sandbox: Sandbox) -> None:
        """A pause that does not succeed is tried again: nothing of the sandbox may be lost."""
        try:
            self._pauses.pause_locked(entry, sandbox)
        except VmcellError as error:
            log.error("sandbox %s is not paused at its end: %s", sandbox.sandbox_id, error)
            self._registry.set_due(entry, sandbox_id=sandbox.sandbox_id, left_ms=PAUSE_AGAIN_MS)

    def _stands(self, sandbox: Sandbox, error: VmcellError) -> None:
        """A sandbox that is to run, and whose vCPUs may stand still: tried again until they run."""

        def let_run() -> None:
            with (
                contextlib.suppress(CallerError),  # ended or paused meanwhile, or it runs already
                self._registry.locked(sandbox.sandbox_id, state=RUNNING) as (_, found),
            ):
                self.containerd.resume_task(found.container)

        self._removals.try_later(sandbox.container, let_run, error)

    def _is_gone(self, container_id: str) -> None:
        self._registry.forget_container(container_id)
        self.volumes.release(container_id)

    # What containerd says.

    def _settle(self) -> None:
        """Adopts whole sandboxes and removes every other trace; opens the slots between."""
        found = survey(self.containerd, self.snapshots, self._state_dir)
        for container_id, mounts in found.mounts.items():
            self.volumes.adopt(container_id, mounts)
        self.slots.open(found.taken_slots())
        pids = self.containerd.task_pids()
        for sandbox in found.whole:
            if sandbox.sandbox_id in found.standing:
                sandbox = self._suspension.settle(sandbox)
            has_machine = sandbox.sandbox_id in found.machines
            entry = self._registry.adopt(
                sandbox, stuck=sandbox.slot_number if has_machine else None
            )
            entry.life.pid = pids.get(sandbox.container, 0)
            if sandbox.state == PAUSED:
                entry.past_pids.add(entry.life.pid)
                self._pauses.end_stuck_machine(entry, sandbox)
                continue
            left_ms = sandbox.end_at_unix_ms - unix_ms_now()
            self._registry.set_due(entry, sandbox_id=sandbox.sandbox_id, left_ms=left_ms)
        for container_id, number in found.doomed.items():
            log.info("removing what an earlier noded left of sandbox %s", container_id)
            self._removals.remove(container_id, number)
        self._settle_snapshots(found.whole)

    def _settle_snapshots(self, whole: Sequence[Sandbox]) -> None:
        present = {sandbox.sandbox_id for sandbox in whole}
        pauses = {sandbox.snapshot_id for sandbox in whole if sandbox.state == PAUSED}
        self.snapshots.settle(pauses=pauses, sandboxes=present)
        for record in self.snapshots.records():
            self._expire_later(record)

    def _listen(self) -> None:
        """Ends sandboxes whose machine ended by itself; connects again for ever."""
        while not self._stop.is_set():
            try:
                for container_id, pid in self.containerd.exits(self._stop):
                    if container_id:
                        sandbox_id = self._registry.sandbox_of(container_id)
                        self._later(self._end_quietly, sandbox_id, DIED, pid)
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
        known = self._running()
        states = self.containerd.task_states()
        for sandbox in known:
            if states.get(sandbox.container) in ENDED:
                self._later(self._end_quietly, sandbox.sandbox_id, DIED)


def _check_restorable(request: SandboxRequest, record: SnapshotRecord) -> None:
    """CallerError for a wish that a machine cannot have that is restored."""
    if request.volume_mounts:
        raise CallerError(
            "a sandbox of a snapshot cannot have volumes; leave them out, or use an image",
            code="failed_precondition",
        )
    if bool(request.access_token) != bool(record.access_token):
        has = "asks for a token" if record.access_token else "asks for no token"
        raise CallerError(
            f"snapshot {record.snapshot_id} is of a sandbox whose envd {has}, and so does one that "
            "is restored",
            code="failed_precondition",
        )
