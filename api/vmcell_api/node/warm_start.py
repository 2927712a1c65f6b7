"""A create is a restore: the snapshot that is taken of a template's first sandbox when it is ready.

The first create of a template boots, and in the background a sandbox of noded's own is made of it,
saved when its ready check has passed, and removed. Later creates restore that. Anything in the way
(no snapshot yet, one that is refused, wishes that a restored machine cannot have) means a boot:
that is slower, and otherwise the same. A snapshot belongs to what it was made of, kernel and base
image of the guest included; where one of these is another by now, it is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from vmcell_api.egress import OPEN
from vmcell_api.identifiers import new_access_token, new_sandbox_id
from vmcell_api.node.build import MachineLife, SandboxBuilder, SandboxRequest
from vmcell_api.node.oci_image import ImageConfig
from vmcell_api.node.oci_spec import ENVD
from vmcell_api.node.pool import Parked, Pool
from vmcell_api.node.sandbox import Sandbox
from vmcell_api.node.slot_plan import Slot
from vmcell_api.node.snapshot_records import (
    TEMPLATE,
    SnapshotRecord,
    SnapshotRecords,
    new_snapshot_id,
)
from vmcell_api.node.suspension import STAND, Suspension
from vmcell_protos.errors import CallerError, VmcellError

log = logging.getLogger("vmcell.noded")

SHIM_CONFIG_VARIABLE, SHIM_CONFIG = "VMCELL_CONFIG", "/etc/vmcell/config.toml"
# Of noded's own sandbox, should noded die before it has removed it.
MAKE_LIFE_MS = 900_000
# A boot would end the same way.
FINAL_CODES = ("already_exists", "resource_exhausted")

Make = Callable[[Slot, MachineLife], Sandbox]


class WarmStart:
    """The snapshots of templates; thread-safe. `limit` is their number, 0: none are made.

    `create(request, make)`, `hand_out(request, parked)` and `kill(id)` are the node's.
    """

    def __init__(
        self,
        *,
        builder: SandboxBuilder,
        snapshots: SnapshotRecords,
        suspension: Suspension,
        create: Callable[[SandboxRequest, Make], Sandbox],
        hand_out: Callable[[SandboxRequest, Parked], Sandbox],
        kill: Callable[[str], None],
        pool: Pool,
        limit: int,
    ) -> None:
        self._builder = builder
        self._snapshots = snapshots
        self._suspension = suspension
        self._create = create
        self._hand_out = hand_out
        self._kill = kill
        self._pool = pool
        self._limit = limit
        self._lock = threading.Lock()
        self._known: dict[str, SnapshotRecord] = {}
        self._making: set[str] = set()
        # One at a time: a create that somebody waits for comes first.
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="templates")

    @property
    def is_on(self) -> bool:
        """Whether any are made."""
        return bool(self._limit)

    def open(self) -> None:
        """Finds those of an earlier noded; those over the limit are removed."""
        for record in self._snapshots.records():
            if record.kind == TEMPLATE:
                self._known[record.template_key] = record
        self._prune()
        for record in self._known.values():
            self._fill_later(record)

    def close(self) -> None:
        """Waits for the one that is being made."""
        self._maker.shutdown(wait=True, cancel_futures=True)

    def restore(self, request: SandboxRequest, image: ImageConfig) -> Sandbox | None:
        """The sandbox, restored; None when it has to boot.

        Raises what a boot would raise too: all slots are in use, the id is.
        """
        if not self._limit or not _is_eligible(request):
            return None
        key = template_key(request, image)
        with self._lock:
            record = self._known.get(key)
        if record is None:
            self._make_later(key, request, image)
            return None
        return self._from_pool(request, record) or self._restored(key, request, record)

    def _from_pool(self, request: SandboxRequest, record: SnapshotRecord) -> Sandbox | None:
        parked = self._pool.take(record.snapshot_id)
        if parked is None:
            return None
        self._fill_later(record)
        try:
            return self._hand_out(request, parked)
        except VmcellError as error:
            if error.code == "already_exists":
                raise
            log.warning("sandbox %s could not be handed out: %s", parked.sandbox.container, error)
            return None

    def _fill_later(self, record: SnapshotRecord) -> None:
        with suppress(RuntimeError):  # closed: the next noded fills it
            self._maker.submit(self._fill, record)

    def _fill(self, record: SnapshotRecord) -> None:
        try:
            self._pool.fill(record)
        except VmcellError as error:  # a create restores for itself then
            log.warning("template %s has nothing parked: %s", record.template_id, error)
        except Exception:
            log.exception("parking sandboxes of template %s failed", record.template_id)
        with self._lock:
            is_known = record in self._known.values()
        if not is_known:  # forgotten while one was being parked
            self._pool.drop(record.snapshot_id)
            self._snapshots.discard(record.snapshot_id)

    def _restored(
        self, key: str, request: SandboxRequest, record: SnapshotRecord
    ) -> Sandbox | None:
        try:
            with self._snapshots.in_use(record.snapshot_id) as saved:
                return self._create(
                    request, lambda slot, life: self._builder.restore(request, saved, slot, life)
                )
        except VmcellError as error:
            if error.code in FINAL_CODES:
                raise
            log.warning("template %s boots, its snapshot is made anew: %s", request.image, error)
            self._forget(key, record)
            return None

    def drop_dead(self, container_id: str) -> None:
        """Removes what was parked in that container, if anything was: its machine has ended."""
        self._pool.drop_dead(container_id)

    def prepare(self, request: SandboxRequest, image: ImageConfig) -> None:
        """Makes the snapshot of a template now, unless there is one; a failure is logged."""
        if not self._limit:
            return
        key = template_key(request, image)
        with self._lock:
            if key in self._known or key in self._making:
                return
            self._making.add(key)
        self._make(key, request, image)

    def forget_image(self, image: str) -> None:
        """Removes the snapshots of templates of that image: it has gone."""
        with self._lock:
            doomed = [row for row in self._known.items() if row[1].image == image]
        for key, record in doomed:
            self._forget(key, record)

    def _forget(self, key: str, record: SnapshotRecord) -> None:
        with self._lock:
            if self._known.get(key) is record:
                del self._known[key]
        self._pool.drop(record.snapshot_id)
        self._snapshots.discard(record.snapshot_id)

    def _make_later(self, key: str, request: SandboxRequest, image: ImageConfig) -> None:
        with self._lock:
            if key in self._making:
                return
            self._making.add(key)
        with suppress(RuntimeError):  # closed: the next noded makes it
            self._maker.submit(self._make, key, request, image)

    def _make(self, key: str, request: SandboxRequest, image: ImageConfig) -> None:
        try:
            record = self._saved(key, request, image)
        except VmcellError as error:  # the next create tries again
            log.warning("template %s has no snapshot: %s", request.image, error)
        except Exception:
            log.exception("making the snapshot of template %s failed", request.image)
        else:
            with self._lock:
                self._known[key] = record
            log.info("template %s is restored from now on", request.image)
            self._prune()
            self._fill_later(record)
        finally:
            with self._lock:
                self._making.discard(key)

    def _saved(self, key: str, request: SandboxRequest, image: ImageConfig) -> SnapshotRecord:
        """The snapshot of a sandbox that nobody else has; nothing of that one is left."""
        own = replace(
            request,
            sandbox_id=new_sandbox_id(),
            environment={},
            access_token=new_access_token(),
            timeout_ms=MAKE_LIFE_MS,
            egress=OPEN,
            pause_on_timeout=False,
            auto_resume=False,
        )
        with self._pool.lending(own.sandbox_id):
            sandbox = self._create(
                own, lambda slot, life: self._builder.build(own, image, slot, life)
            )
            try:
                return self._suspension.save(
                    sandbox,
                    new_snapshot_id(TEMPLATE),
                    kind=TEMPLATE,
                    then=STAND,
                    drop_caches=True,
                    template_key=key,
                )
            finally:
                with suppress(CallerError):  # somebody needed its slot
                    self._kill(sandbox.sandbox_id)

    def _prune(self) -> None:
        """Removes what is of an older kernel or base image, then the oldest over the limit."""
        with self._lock:
            rows = sorted(self._known.items(), key=lambda row: row[1].created_at_unix_ms)
            newest = {key.partition("-")[0]: key for key, _ in rows}
            stale = [row for row in rows if newest[row[0].partition("-")[0]] != row[0]]
            rest = [row for row in rows if row not in stale]
            doomed = stale + rest[: max(0, len(rest) - self._limit)]
        for key, record in doomed:
            self._forget(key, record)


def _is_eligible(request: SandboxRequest) -> bool:
    """Whether a restored machine can be what is asked for; its envd always wants a token."""
    return request.init == ENVD and not request.volume_mounts and bool(request.access_token)


def template_key(request: SandboxRequest, image: ImageConfig) -> str:
    """What a template's snapshot is of: "<all but the guest's own files>-<these>"."""
    shape = (
        image,
        request.vcpus,
        request.memory_mib,
        request.default_user,
        request.default_workdir,
        request.start_command,
        request.ready_command,
    )
    return f"{_digest(repr(shape))}-{_digest(repr(_guest_files()))}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _guest_files() -> list[tuple[str, int, int, int]]:
    """Kernel and base image as the shim's configuration names them: path, inode, size, mtime.

    One that cannot be looked at counts as absent; whether it is, the shim says at the next boot.
    """
    path = os.environ.get(SHIM_CONFIG_VARIABLE) or SHIM_CONFIG
    found = []
    with suppress(OSError, ValueError):
        with open(path, "rb") as file:
            table = tomllib.load(file)
        for name in ("kernel", "base_image"):
            status = os.stat(str(table.get(name, "")))
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return found
