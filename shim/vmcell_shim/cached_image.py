"""One EROFS image of the cache: its files, how it is held, how it is known to be whole.

<cache_dir>/erofs holds for each image `KEY.erofs` and its record `KEY.erofs.json` (its layers, its
length, the digest of its first page); KEY is a digest of the layers' identities. What makes it safe
with many shims, each of which may be killed at any step:
- who uses an image holds a shared flock on it, which the kernel drops with the last descriptor: an
  image in use is known after any crash, and nothing stays locked;
- who builds holds an exclusive flock on `KEY.erofs.partial`; a partial file that nobody has locked
  was left by a killed build;
- files appear and go under the lock of the directory, which is never held while an image is built.
A file that is shorter than it was, or whose first page is another, is not used but built again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

from vmcell_shim.erofs_superblock import HEAD_BYTES
from vmcell_shim.file_lock import Locked, lock, names

TYPE_CHECKING = False
if TYPE_CHECKING:
    Chain = list[tuple[str, int, int]]

IMAGE, RECORD, PARTIAL = ".erofs", ".erofs.json", ".erofs.partial"
_LOCK_TIMEOUT_S = 30.0


def cache_directory(cache_dir: str) -> str:
    return os.path.join(cache_dir, "erofs")


def locked_directory(directory: str) -> Locked:
    """The lock under which files appear and go; for the length of a block."""
    return Locked(os.path.join(directory, "lock"), timeout_s=_LOCK_TIMEOUT_S)


class CachedImage:
    """An image that stays in the cache until `close`, or until this process has ended."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def close(self) -> None:
        """Gives the image free for removal. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_image(image: str) -> CachedImage | None:
    """The image, held and marked as used now; None when it is not there or not what was built."""
    try:
        fd = os.open(image, os.O_RDONLY)
    except FileNotFoundError:
        return None
    good = False
    try:
        lock(fd, shared=True, timeout_s=_LOCK_TIMEOUT_S)
        good = names(image, fd) and is_whole(fd, read_record(image))
        if good:
            os.utime(record_path(image))  # not the image: its digest stands as long as its times
    finally:
        if not good:
            os.close(fd)
    return CachedImage(image, fd) if good else None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `KEY.erofs.json` says."""

    chain: Chain
    length_bytes: int
    head: str


def record_path(image: str) -> str:
    """Of the record of an image by its path. The record's mtime is when the image was used last."""
    return image[: -len(IMAGE)] + RECORD


def read_record(image: str) -> Record | None:
    """None for a record that is missing or damaged: its image is then as good as none."""
    try:
        with open(record_path(image), encoding="utf-8") as file:
            tree = json.load(file)
        return Record(
            chain=[(str(path), int(inode), int(ctime)) for path, inode, ctime in tree["layers"]],
            length_bytes=int(tree["length"]),
            head=str(tree["head"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def is_whole(fd: int, record: Record | None) -> bool:
    return (
        record is not None
        and os.fstat(fd).st_size == record.length_bytes
        and digest_head(fd) == record.head
    )


def digest_head(fd: int) -> str:
    """The first page has the superblock, with an id of its own for every build."""
    return hashlib.sha256(os.pread(fd, HEAD_BYTES, 0)).hexdigest()
