"""What noded knows of each snapshot that it asked a shim for.

The shim writes `<snapshot_dir>/<id>/` in one step: it is there and whole, or it is not there.
Beside it noded keeps `<snapshot_dir>/.noded/<namespace>/<id>.json`, for root only because envd's
token is in it, and a lease that keeps the image's layers. The record is written first and removed
last, so that whatever noded leaves half-done is found by its record; directories without one are
not noded's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.node.containerd import Containerd
from vmcell_api.snapshot_facts import SnapshotFile
from vmcell_protos.errors import CallerError, HostError

log = logging.getLogger("vmcell.noded")

FOLDER = ".noded"
LEASE_PREFIX = "vmcell-snapshot-"
# What it is for: to resume by, asked for by a client, the state before a rollback, a template's.
PAUSE, KEPT, UNDO, TEMPLATE = "pause", "kept", "undo", "template"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20


_PREFIXES = {PAUSE: "pause", KEPT: "snap", UNDO: "undo", TEMPLATE: "tpl"}
# Those that clients may name.
CLIENTS_ID = re.compile(r"(snap|undo)-[a-z0-9]{20}")


def new_snapshot_id(kind: str) -> str:
    """A fresh id."""
    return f"{_PREFIXES[kind]}-{new_sandbox_id()}"


@dataclass(frozen=True, kw_only=True)
class SnapshotRecord:
    """Times are unix milliseconds; `expires_at_unix_ms` 0: never.

    `chain_id` names the image's layers below the disk. `access_token` is what envd in the saved
    memory asks for, `environment` what it gives to commands.
    """

    snapshot_id: str
    kind: str
    sandbox_id: str
    template_id: str
    image: str
    chain_id: str
    vcpus: int
    memory_mib: int
    created_at_unix_ms: int
    expires_at_unix_ms: int = 0
    access_token: str = field(default="", repr=False)
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    template_key: str = ""  # of a TEMPLATE: what it is the snapshot of


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The part of the shim's manifest.json that noded tells on."""

    parent: str
    files: tuple[SnapshotFile, ...]


class SnapshotRecords:
    """The snapshots of one namespace; thread-safe. The connection stays the caller's."""

    def __init__(self, containerd: Containerd, snapshot_dir: str) -> None:
        self._containerd = containerd
        self._directory = Path(snapshot_dir)
        self._folder = Path(snapshot_dir, FOLDER, containerd.namespace)
        self._lock = threading.Lock()
        self._restoring: dict[str, int] = {}

    def open(self) -> None:
        """Makes the folder; raises HostError."""
        try:
            self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(
                f"cannot make {self._folder}: {error}; name another snapshot_dir"
            ) from (error)

    def reserve(self, record: SnapshotRecord) -> None:
        """Writes the record of a snapshot that is about to be made, and keeps its layers."""
        path = self._record_path(record.snapshot_id)
        with self._lock:
            if path.exists():
                raise CallerError(
                    f"snapshot {record.snapshot_id} exists already", code="already_exists"
                )
            self._write(path, record)
        lease = LEASE_PREFIX + record.snapshot_id
        self._containerd.create_lease(lease, {})
        self._containerd.keep_layers(lease, record.chain_id)

    def _write(self, path: Path, record: SnapshotRecord) -> None:
        fresh = path.with_suffix(".new")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(record), file)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error}") from error

    def get(self, snapshot_id: str) -> SnapshotRecord:
        """A whole snapshot; CallerError not_found."""
        record = self._read(self._record_path(snapshot_id))
        if record is None or not self.is_whole(snapshot_id):
            raise CallerError(
                f"snapshot {snapshot_id} was not found on this node", code="not_found"
            )
        return record

    def records(self, *, sandbox_id: str = "") -> list[SnapshotRecord]:
        """Every record, whole or not, oldest first; of one sandbox when it is named."""
        found = [self._read(path) for path in self._folder.glob("*.json")]
        rows = [row for row in found if row and sandbox_id in ("", row.sandbox_id)]
        return sorted(rows, key=lambda row: (row.created_at_unix_ms, row.snapshot_id))

    def is_whole(self, snapshot_id: str) -> bool:
        """Whether its directory is there."""
        return (self._directory / snapshot_id / MANIFEST).is_file()

    def manifest(self, snapshot_id: str) -> Manifest:
        """Sizes and digests of its files; raises HostError (data_loss) when they cannot be read."""
        path = self._directory / snapshot_id / MANIFEST
        try:
            with path.open("rb") as file:
                data = json.loads(file.read(MAX_MANIFEST_BYTES))
            files = tuple(
                SnapshotFile(
                    name=str(name),
                    size=int(row["bytes"]),
                    allocated=int(row["allocated_bytes"]),
                    digest=str(row["digest"]),
                )
                for name, row in sorted(data["files"].items())
            )
            return Manifest(parent=str(data.get("parent", "")), files=files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HostError(
                f"snapshot {snapshot_id} has no readable {MANIFEST}: {error}", code="data_loss"
            ) from error

    @contextlib.contextmanager
    def in_use(self, snapshot_id: str) -> Iterator[SnapshotRecord]:
        """The snapshot, which is not removed inside the block; CallerError not_found."""
        with self._lock:
            record = self.get(snapshot_id)
            self._restoring[snapshot_id] = self._restoring.get(snapshot_id, 0) + 1
        try:
            yield record
        finally:
            with self._lock:
                self._restoring[snapshot_id] -= 1
                if not self._restoring[snapshot_id]:
                    del self._restoring[snapshot_id]

    def remove(self, snapshot_id: str) -> None:
        """Removes all of it, a missing one too; machines restored from it go on.

        CallerError aborted while one is being restored from it, HostError for what stays.
        """
        with self._lock:
            if snapshot_id in self._restoring:
                raise CallerError(
                    f"snapshot {snapshot_id} is being restored; try again in a moment",
                    code="aborted",
                )
            doomed = self._directory / snapshot_id
            try:
                with contextlib.suppress(FileNotFoundError):
                    # Without its manifest it is no snapshot, whatever else is left of it.
                    (doomed / MANIFEST).unlink()
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(doomed)
            except OSError as error:
                raise HostError(f"cannot remove snapshot {snapshot_id}: {error}") from error
        self._containerd.delete_lease(LEASE_PREFIX + snapshot_id)
        self._record_path(snapshot_id).unlink(missing_ok=True)

    def settle(self, *, pauses: Collection[str], sandboxes: Collection[str]) -> None:
        """Removes what an earlier noded left of snapshots.

        That is halves, pauses that are not among `pauses`, undo points of sandboxes that are not
        among `sandboxes`, and leases without a record. What cannot be removed is logged.
        """
        known = set()
        for record in self.records():
            known.add(record.snapshot_id)
            unwanted = record.kind == PAUSE and record.snapshot_id not in pauses
            orphaned = record.kind == UNDO and record.sandbox_id not in sandboxes
            if unwanted or orphaned or not self.is_whole(record.snapshot_id):
                self.discard(record.snapshot_id)
        for lease in self._containerd.lease_ids():
            if lease.startswith(LEASE_PREFIX) and lease.removeprefix(LEASE_PREFIX) not in known:
                self._containerd.delete_lease(lease)

    def discard(self, snapshot_id: str) -> bool:
        """Removes it and answers whether that was possible; why not is logged."""
        try:
            self.remove(snapshot_id)
        except (CallerError, HostError) as error:
            log.error("%s", error)
            return False
        return True

    def _record_path(self, snapshot_id: str) -> Path:
        return self._folder / f"{snapshot_id}.json"

    def _read(self, path: Path) -> SnapshotRecord | None:
        try:
            data = json.loads(path.read_bytes())
            known = {row.name for row in fields(SnapshotRecord)}
            return SnapshotRecord(**{key: value for key, value in data.items() if key in known})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("the record %s cannot be read and is left alone: %s", path, error)
            return None
