"""The dev VM's initramfs: busybox, drivers and keys, as one newc archive.

Format: Documentation/driver-api/early-userspace/buffer-format.rst, cpio "newc" (magic 070701):
thirteen fields of eight hex digits, name and data each padded to four bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

TRAILER = "TRAILER!!!"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file, directory or symbolic link (`content` is its target); `path` has no leading /."""

    path: str
    mode: int
    content: bytes = b""


def file(path: str, content: bytes, *, mode: int = 0o644) -> Entry:
    return Entry(path=path, mode=stat.S_IFREG | mode, content=content)


def symlink(path: str, target: str) -> Entry:
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, content=os.fsencode(target))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries` with the directories they need, in order."""
    parts: list[bytes] = []
    made: set[str] = set()
    for number, entry in enumerate(_with_directories(entries, made), start=1):
        parts.append(_record(number, entry))
    parts.append(_record(0, Entry(path=TRAILER, mode=0)))
    return b"".join(parts)


def directory(path: str) -> Entry:
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def _with_directories(entries: Iterable[Entry], made: set[str]) -> Iterable[Entry]:
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.path).parents):
            if str(parent) not in made and str(parent) != ".":
                made.add(str(parent))
                yield directory(str(parent))
        if stat.S_ISDIR(entry.mode):
            if entry.path in made:
                continue
            made.add(entry.path)
        yield entry


def _record(inode: int, entry: Entry) -> bytes:
    name = os.fsencode(entry.path) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return _padded(header) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
