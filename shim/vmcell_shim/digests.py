"""Digests of large files, computed once as long as a file stays what it is.

Whoever writes to a file, truncates or replaces it changes its change time, inode or length, and
nobody but the kernel sets a change time; so a digest stands for as long as these four do: device
and inode (the record's name), length, mtime and ctime. What was changed a moment before it was
read could be changed again within the same tick of the clock, so it is not remembered.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress

from vmcell_shim.sandbox_files import make_directory
from vmcell_shim.sparse import content_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.config import ShimConfig

# Change times have the granularity of the kernel's tick, 10 ms at most.
_SETTLED_NS = 50_000_000
# Records of files that are gone are found by nobody; beyond so many the older half is forgotten.
_MAX_RECORDS = 4096


class Digests:
    """Remembers in `directory`, which is root's alone. Any number of processes may share it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def of(self, fd: int) -> str:
        """The digest of an open regular file's content. Raises OSError."""
        began_ns = time.time_ns()
        before = _identity(os.fstat(fd))
        name = f"{before[0]:x}-{before[1]:x}"
        known = self._known(name)
        if known is not None and known[0] == before[2:]:
            return known[1]
        digest = content_digest(fd)
        settled = began_ns - before[-1] >= _SETTLED_NS
        if settled and _identity(os.fstat(fd)) == before:
            self._remember(name, before[2:], digest)
        return digest

    def of_path(self, path: str) -> str:
        """The same of a file by its name. Raises OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self.of(fd)
        finally:
            os.close(fd)

    def _known(self, name: str) -> tuple[list[int], str] | None:
        try:
            with open(os.path.join(self._directory, name), encoding="utf-8") as file:
                identity, digest = json.load(file)
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None
        if not isinstance(digest, str):
            return None
        return identity, digest

    def _remember(self, name: str, identity: list[int], digest: str) -> None:
        make_directory(self._directory)
        path = os.path.join(self._directory, name)
        partial = f"{path}.{os.getpid()}.{threading.get_native_id()}"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                json.dump([identity, digest], file)
            os.rename(partial, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        self._forget_the_oldest()

    def _forget_the_oldest(self) -> None:
        written: list[tuple[int, str]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process forgets too
                    written.append((entry.stat().st_mtime_ns, entry.path))
        if len(written) <= _MAX_RECORDS:
            return
        for _, path in sorted(written)[: len(written) // 2]:
            with suppress(FileNotFoundError):
                os.unlink(path)


def snapshot_digests(config: ShimConfig) -> Digests:
    """What this host knows of the content of its files."""
    return Digests(os.path.join(config.cache_dir, "digests"))


def _identity(status: os.stat_result) -> list[int]:
    """Device, inode, length, mtime and ctime (ns)."""
    return [
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    ]
