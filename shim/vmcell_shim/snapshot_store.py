"""Snapshots on this host: a directory each, whole or not there, root's alone.

<snapshot_dir>/<id>/ holds manifest.json, state.json, memory and disk. It is made under a name that
begins with a dot and renamed when all is written, digested and on the disk. That name says which
process makes it: what a dead one has left goes when the next is made. Whoever opens one gets
descriptors of exactly the bytes whose digests the manifest has: another file put in its place
afterwards is not what they read.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from dataclasses import dataclass

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.living import identify, start_ticks
from vmcell_shim.sandbox_files import make_directory
from vmcell_shim.snapshot_manifest import (
    DISK,
    MANIFEST,
    MEMORY,
    STATE,
    Manifest,
    SavedFile,
    check_id,
    file_names,
    parse,
    render,
)
from vmcell_shim.sparse import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmcell_shim.digests import Digests

_READ_ONLY = 0o400
# What is being made or removed: whose, and by which process (pid, start time).
_HIDDEN = re.compile(r"\.[a-z0-9-]+\.([0-9]+)-([0-9]+)\.[0-9]+")


@dataclass(frozen=True, kw_only=True)
class OpenSnapshot:
    """A verified snapshot; owns its descriptors until close(). `disk_fd` is -1 without a disk."""

    id: str
    manifest: Manifest
    state_fd: int
    memory_fd: int
    disk_fd: int

    def close(self) -> None:
        for fd in (self.state_fd, self.memory_fd, self.disk_fd):
            if fd >= 0:
                os.close(fd)


class SnapshotDraft:
    """A snapshot that is being made in `directory`; commit() or discard() ends it."""

    def __init__(self, root: str, snapshot_id: str) -> None:
        """Raises CallerError for an id that is none or is taken, HostError."""
        check_id(snapshot_id)
        self._path = os.path.join(root, snapshot_id)
        self.id = snapshot_id
        if os.path.exists(self._path):
            raise CallerError(f"snapshot {snapshot_id} exists already", code="already_exists")
        self.directory = _hidden(root, snapshot_id)
        try:
            make_directory(self.directory)
            sweep(root)
        except OSError as error:
            self.discard()
            raise HostError(f"cannot make {self.directory}: {error.strerror}") from error

    def create(self, name: str) -> int:
        """A new empty file for reading and writing, the caller's to close. Raises OSError."""
        path = os.path.join(self.directory, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600)

    def saved_files(self, names: Iterable[str], digests: Digests) -> dict[str, SavedFile]:
        """Lengths and digests of what has been written, which is read-only from now on. OSError."""
        return {name: self._saved_file(name, digests) for name in names}

    def _saved_file(self, name: str, digests: Digests) -> SavedFile:
        fd = os.open(os.path.join(self.directory, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(fd, _READ_ONLY)
            os.fsync(fd)
            status = os.fstat(fd)
            return SavedFile(
                bytes=status.st_size,
                allocated_bytes=512 * status.st_blocks,
                digest=digests.of(fd),
            )
        finally:
            os.close(fd)

    def seal(self, manifest: Manifest) -> None:
        """Its directory is a whole snapshot. Raises OSError."""
        fd = self.create(MANIFEST)
        try:
            write_all(fd, render(manifest))
            os.fchmod(fd, _READ_ONLY)
            os.fsync(fd)
        finally:
            os.close(fd)
        _sync_directory(self.directory)

    def commit(self) -> None:
        """What is sealed is there under its id, or after an error not at all. CallerError if
        another came first; OSError."""
        try:
            os.rename(self.directory, self._path)
        except OSError as error:
            if isinstance(error, FileExistsError) or os.path.exists(self._path):
                raise CallerError(
                    f"snapshot {self.id} exists already", code="already_exists"
                ) from error
            raise
        try:
            _sync_directory(os.path.dirname(self._path))
        except OSError:
            os.rename(self._path, self.directory)
            raise

    def discard(self) -> None:
        """Nothing of it is left. Idempotent, and nothing to do after commit()."""
        shutil.rmtree(self.directory, ignore_errors=True)


def open_snapshot(root: str, snapshot_id: str, digests: Digests) -> OpenSnapshot:
    """The snapshot, every byte of it as it was made. The caller closes it.

    CallerError: not_found, data_loss with the file's name, failed_precondition for a format this
    version does not read. Raises HostError when it cannot be read.
    """
    check_id(snapshot_id)
    return open_directory(os.path.join(root, snapshot_id), snapshot_id, digests)


def remove_snapshot(root: str, snapshot_id: str) -> None:
    """Nothing of it is left; guests that go on from it keep what they have. Idempotent. Raises
    CallerError for what is no id, HostError."""
    check_id(snapshot_id)
    path = os.path.join(root, snapshot_id)
    gone = _hidden(root, snapshot_id)
    try:
        os.rename(path, gone)
        _sync_directory(root)  # a crash does not bring back what was told to be gone
        shutil.rmtree(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove snapshot {snapshot_id}: {error}") from error


def sweep(root: str) -> None:
    """Removes what processes that have ended were making or removing. Raises OSError."""
    for name in os.listdir(root):
        found = _HIDDEN.fullmatch(name)
        if found and start_ticks(int(found[1])) != int(found[2]):
            # Another one may be at it too.
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def _hidden(root: str, snapshot_id: str) -> str:
    """A path that is no snapshot's, and this process's alone."""
    maker = identify(os.getpid())
    name = f".{snapshot_id}.{maker.pid}-{maker.start_ticks}.{time.monotonic_ns()}"
    return os.path.join(root, name)


def open_directory(path: str, name: str, digests: Digests) -> OpenSnapshot:
    """The same for one that stands anywhere; `name` is what sentences call it."""
    opened: dict[str, int] = {}
    try:
        manifest = parse(_read_manifest(path, name), name)
        for file_name in file_names(disk=manifest.disk):
            opened[file_name] = open_file(path, name, file_name)
            _verify(opened[file_name], manifest.files[file_name], name, file_name, digests)
        return OpenSnapshot(
            id=name,
            manifest=manifest,
            state_fd=opened.pop(STATE),
            memory_fd=opened.pop(MEMORY),
            disk_fd=opened.pop(DISK, -1),
        )
    except OSError as error:
        raise HostError(f"cannot read snapshot {name}: {error}") from error
    finally:
        for fd in opened.values():
            os.close(fd)


def _read_manifest(path: str, name: str) -> bytes:
    if not os.path.isdir(path):
        raise CallerError(f"snapshot {name} does not exist on this host", code="not_found")
    fd = open_file(path, name, MANIFEST)
    with open(fd, "rb") as file:
        return file.read((1 << 20) + 1)


def open_file(path: str, name: str, file_name: str) -> int:
    """A regular file itself, not what a link leads to; CallerError (data_loss) if it is none."""
    try:
        fd = os.open(
            os.path.join(path, file_name),
            os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
        )
    except OSError as error:
        raise _damaged(name, file_name, error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _damaged(name, file_name, "it is no regular file")
    return fd


def _verify(fd: int, saved: SavedFile, name: str, file_name: str, digests: Digests) -> None:
    length = os.fstat(fd).st_size
    if length != saved.bytes:
        raise _damaged(name, file_name, f"it has {length} bytes and had {saved.bytes}")
    if digests.of(fd) != saved.digest:
        raise _damaged(name, file_name, "its content is not what was saved")


def _damaged(name: str, file_name: str, what: str) -> CallerError:
    return CallerError(
        f"{file_name} of snapshot {name} is damaged: {what}; delete the snapshot",
        code="data_loss",
    )


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
