"""The build cache: each built thing is a directory named by the digest of all it was made from.

`<root>/<kind>/<digest>/` appears complete or not at all: it is filled under another name beside and
renamed. One build per kind at a time; what a killed build left is removed by the next.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.file_lock import lock, try_lock
from vmcell_tools.progress import Progress

LOCK_DEADLINE_S = 3600.0
UNFINISHED_PREFIX = ".building-"
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# A tool that fails with less than this free failed for want of space, whatever it printed.
NEARLY_FULL_BYTES = 2 << 20


def input_digest(*parts: str | bytes) -> str:
    """32 hex digits over the parts; their lengths count, so ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()[:32]


class BuildCache:
    """The cache below `root`; nothing is created before the first build."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def default(cls) -> BuildCache:
        """`$XDG_CACHE_HOME/vmcell`, or `~/.cache/vmcell` when that is unset or not absolute."""
        configured = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
        return cls(base / "vmcell")

    def find(self, kind: str, digest: str) -> Path | None:
        """The directory of a finished build, or None."""
        directory = self.root / kind / digest
        return directory if directory.is_dir() else None

    def build(
        self, kind: str, digest: str, fill: Callable[[Path], None], progress: Progress
    ) -> Path:
        """The directory for `digest`, filled by `fill(empty directory)` when it is not there yet.

        Whatever `fill` raises, nothing is left behind. Raises HostError for a full disk,
        CallerError for another user's cache.
        """
        found = self.find(kind, digest)
        if found is not None:
            self._note_use(found)
            return found
        home = self.root / kind
        with self._full_disk_named(kind):
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home, progress):
                found = self.find(kind, digest)
                return found or self._fill(home, digest, fill)

    def _note_use(self, found: Path) -> None:
        try:
            os.utime(found)
        except PermissionError as error:
            raise CallerError(
                f"the build cache {self.root} is another user's; run it as that user, or set"
                " XDG_CACHE_HOME to a directory of yours"
            ) from error

    def _fill(self, home: Path, digest: str, fill: Callable[[Path], None]) -> Path:
        for stale in home.glob(f"{UNFINISHED_PREFIX}*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=home))
        try:
            work.chmod(0o755)
            fill(work)
            _flush(work)
            return work.rename(home / digest)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def keep_newest(self, kind: str, count: int) -> None:
        """Drop all but the `count` builds of `kind` that were asked for last."""
        home = self.root / kind
        builds = [path for path in home.iterdir() if not path.name.startswith(".")]
        builds.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for old in builds[count:]:
            shutil.rmtree(old)

    @contextmanager
    def _full_disk_named(self, kind: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL_DISK_ERRNOS:
                raise HostError(f"cannot build {kind} in {self.root}: {error}") from error
            raise self._full_disk(kind) from error
        except HostError as error:
            if self._free_bytes() >= NEARLY_FULL_BYTES:
                raise
            raise self._full_disk(kind) from error

    def _full_disk(self, kind: str) -> HostError:
        return HostError(
            f"no space left on the disk of {self.root} while building {kind}; free some, or set"
            " XDG_CACHE_HOME to a directory on a larger disk, and run the command again",
            code="resource_exhausted",
        )

    def _free_bytes(self) -> int:
        nearest = next(path for path in (self.root, *self.root.parents) if path.exists())
        status = os.statvfs(nearest)
        return status.f_bavail * status.f_frsize


@contextmanager
def _locked(home: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of one kind; another build of it is waited for, and that is said."""
    descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not try_lock(descriptor):
            progress.step(f"waiting for another command that builds in {home}")
            try:
                lock(descriptor, timeout_s=LOCK_DEADLINE_S)
            except HostError as error:
                raise HostError(
                    f"another command has been building in {home} for"
                    f" {LOCK_DEADLINE_S / 60:.0f} minutes; end it"
                ) from error
        yield
    finally:
        os.close(descriptor)


def _flush(directory: Path) -> None:
    """To disk before the rename, so that a power cut cannot publish an empty file."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
