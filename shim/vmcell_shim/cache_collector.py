"""What is in the image cache, and what of it goes: stale, damaged, or not used for longest.

An image is stale when one of its layers has gone from the snapshotter: containerd has removed the
image it was made for.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from vmcell_protos.errors import HostError
from vmcell_shim.cached_image import (
    IMAGE,
    PARTIAL,
    RECORD,
    cache_directory,
    is_whole,
    locked_directory,
    read_record,
    record_path,
)
from vmcell_shim.file_lock import try_lock

_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's are (stat(2))


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One image of the cache. `used_at_s` is unix time; `state` is "in use", "idle", "stale" (a
    layer has gone), or "damaged"."""

    key: str
    path: str
    size_bytes: int
    used_at_s: int
    state: str
    layers: tuple[str, ...]


def list_images(cache_dir: str) -> list[ImageRow]:
    """All images, the most recently used first. Raises HostError."""
    directory = cache_directory(cache_dir)
    try:
        if not _is_there_at_all(directory):
            return []
        with locked_directory(directory):
            return _rows(directory)
    except OSError as error:
        words = error.strerror or error
        raise HostError(
            f"cannot read the image cache {directory}: {words}; run it as root"
        ) from error


def _is_there_at_all(directory: str) -> bool:
    """False before the first image; OSError where one may not look, which is no empty cache."""
    try:
        os.stat(directory)
    except FileNotFoundError:
        return False
    return True


def _rows(directory: str) -> list[ImageRow]:
    found = [name for name in os.listdir(directory) if name.endswith(IMAGE)]
    rows = [_row(os.path.join(directory, name)) for name in found]
    return sorted(rows, key=lambda row: row.used_at_s, reverse=True)


def _row(image: str) -> ImageRow:
    record = read_record(image)
    fd = os.open(image, os.O_RDONLY)
    try:
        status = os.fstat(fd)
        if not is_whole(fd, record):
            state = "damaged"
        elif not try_lock(fd):
            state = "in use"
        else:
            state = "idle" if record and all(map(_is_there, record.chain)) else "stale"
    finally:
        os.close(fd)
    return ImageRow(
        key=os.path.basename(image)[: -len(IMAGE)],
        path=image,
        size_bytes=status.st_blocks * _BLOCK_BYTES,
        used_at_s=_used_at_s(image),
        state=state,
        layers=tuple(path for path, *_ in record.chain) if record else (),
    )


def _used_at_s(image: str) -> int:
    try:
        return int(os.stat(record_path(image)).st_mtime)
    except FileNotFoundError:
        return 0


def _is_there(identity: tuple[str, int, int]) -> bool:
    path, inode, ctime_ns = identity
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (status.st_ino, status.st_ctime_ns) == (inode, ctime_ns)


def collect(cache_dir: str, *, limit_mib: int) -> list[ImageRow]:
    """Removes what is stale, damaged or left by killed builds, then the least recently used idle
    images until all together take `limit_mib` at most; returns the images removed.

    Raises HostError. Images in use stay, also over the limit.
    """
    directory = cache_directory(cache_dir)
    removed = []
    try:
        if not _is_there_at_all(directory):
            return []
        with locked_directory(directory):
            rows = _rows(directory)
            _remove_leftovers(directory, {row.key for row in rows})
            total = sum(row.size_bytes for row in rows)
            for row in reversed(rows):
                over = total > limit_mib << 20 and row.state == "idle"
                if (over or row.state in ("stale", "damaged")) and _remove(row):
                    total -= row.size_bytes
                    removed.append(row)
    except OSError as error:
        words = error.strerror or error
        raise HostError(
            f"cannot clean the image cache {directory}: {words}; run it as root"
        ) from error
    return removed


def _remove(row: ImageRow) -> bool:
    """Removes image and record unless somebody holds the image since it was looked at."""
    fd = os.open(row.path, os.O_RDONLY)
    try:
        if not try_lock(fd):
            return False
        os.unlink(row.path)
    finally:
        os.close(fd)
    with suppress(FileNotFoundError):
        os.unlink(record_path(row.path))
    return True


def _remove_leftovers(directory: str, keys: set[str]) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(PARTIAL):
            _remove_partial(path)
            continue
        alone = name.endswith(RECORD) and name[: -len(RECORD)] not in keys
        if alone or name.endswith(RECORD + ".new"):
            os.unlink(path)


def _remove_partial(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if try_lock(fd):
            os.unlink(path)
    finally:
        os.close(fd)
