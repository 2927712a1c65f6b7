"""Merged image layers as one read-only EROFS file per chain, made once and kept.

A committed snapshot directory never changes, so a chain of them is known by the real path, inode
and change time of each directory. The layers are merged by an overlay mount in a mount namespace
of the building process alone: whatever ends that process also ends the mount. The image is
uncompressed with no inlined file tails (`-E noinline_data`: a file with an inlined tail is never
DAX) and padded to 2 MiB, which virtio-pmem asks for.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os

from vmcell_protos.errors import HostError
from vmcell_shim.spawn import run_program

ALIGN_BYTES = 2 << 20
_BUILD_TIMEOUT_S = 1800
# Changes when the way images are made changes, so that old ones are not taken for new ones.
_FORMAT = 1
# mount(2) takes one page of options; the common parent keeps the names in it short.
_OPTIONS_LIMIT_BYTES = 4000

_MKFS = ["mkfs.erofs", "--quiet", "--preserve-mtime", "-Enoinline_data"]
# $1 where the layers are named from, $2 overlay options, $3 mount point, then mkfs and its options.
_MERGE = 'cd "$1"; mount -t overlay -o "$2" overlay "$3"; dir=$3; shift 3; exec "$@" "$dir"'


def chain_image(lower_dirs: list[str], cache_dir: str) -> str:
    """Path of the image of `lower_dirs` (topmost first), built if it is not there yet.

    Several shims may ask at once: one builds, the others wait for it. Raises HostError; a failed
    build leaves nothing behind.
    """
    chain = [_identity(path) for path in lower_dirs]
    key = hashlib.sha256(json.dumps([_FORMAT, chain]).encode()).hexdigest()
    directory = os.path.join(cache_dir, "erofs")
    image = os.path.join(directory, key + ".erofs")
    if os.path.exists(image):
        return image
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with _Locked(os.path.join(directory, "lock")):
            _remove_unusable(directory)
            if not os.path.exists(image):
                _build(lower_dirs, image, chain)
    except OSError as error:
        raise HostError(f"cannot build the image {image}: {error}") from error
    return image


def _build(lower_dirs: list[str], image: str, chain: list[tuple[str, int, int, int]]) -> None:
    """The image, and before it its sources: without them it would never be collected."""
    _write_sources(image, chain)
    try:
        merged_image(lower_dirs, image)
    except BaseException:
        os.unlink(image + ".json")
        raise


def _identity(path: str) -> tuple[str, int, int, int]:
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError as error:
        raise HostError(f"layer {path} of the image cannot be read: {error}") from error
    return real, status.st_dev, status.st_ino, status.st_ctime_ns


class _Locked:
    """An exclusive lock on a file, held as long as the block."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def merged_image(lower_dirs: list[str], image: str) -> None:
    """Builds the image of `lower_dirs` (topmost first) at `image`. Raises HostError."""
    partial = image + ".partial"
    merged, empty = image + ".merged", image + ".empty"
    os.makedirs(merged, exist_ok=True)
    os.makedirs(empty, exist_ok=True)
    try:
        common = os.path.commonpath([os.path.dirname(path) for path in lower_dirs])
        options = _overlay_options(common, [*lower_dirs, empty])
        script = ["sh", "-ec", _MERGE, "sh", common, options, merged, *_MKFS, partial]
        _make_image(["unshare", "--mount", *script], partial, " + ".join(lower_dirs))
        os.rename(partial, image)
    finally:
        os.rmdir(merged)
        os.rmdir(empty)


def tree_image(source: str, image: str) -> None:
    """An image of one directory as it is now, for a root that is no chain. Raises HostError."""
    _make_image([*_MKFS, image, source], image, source)


def _overlay_options(common: str, directories: list[str]) -> str:
    """`directories` topmost first; an empty bottom makes one layer an overlay too, so that
    whiteouts and overlay's own attributes vanish in every case."""
    names = [os.path.relpath(path, common) for path in directories]
    for name in names:
        if any(mark in name for mark in ",:\\"):
            raise HostError(
                f"layer {name} cannot be mounted: its path holds ',', ':' or a backslash"
            )
    options = "ro,lowerdir=" + ":".join(names)
    if len(options) > _OPTIONS_LIMIT_BYTES:
        raise HostError(
            f"the image has {len(names) - 1} layers, more than one overlay mount can name; "
            "use an image with fewer layers"
        )
    return options


def _make_image(command: list[str], image: str, source: str) -> None:
    try:
        try:
            code, output = run_program(command, timeout_s=_BUILD_TIMEOUT_S)
        except FileNotFoundError as error:
            raise HostError(f"cannot run {command[0]}: {error}; install erofs-utils") from error
        if code:
            detail = output.splitlines()[-1] if output else "no message"
            raise HostError(
                f"cannot build the image of {source}: {command[0]} ended with {code}: {detail}; "
                f"{_free_space(image)}"
            )
        fd = os.open(image, os.O_RDWR)
        try:
            size = os.fstat(fd).st_size
            os.ftruncate(fd, -(-size // ALIGN_BYTES) * ALIGN_BYTES)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        if os.path.exists(image):
            os.unlink(image)
        raise


def _free_space(path: str) -> str:
    directory = os.path.dirname(path)
    status = os.statvfs(directory)
    return f"{status.f_bavail * status.f_frsize >> 20} MiB are free in {directory}"


def _write_sources(image: str, chain: list[tuple[str, int, int, int]]) -> None:
    path = image + ".json.partial"
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump([source for source, *_ in chain], file)
        os.rename(path, image + ".json")
    except BaseException:
        if os.path.exists(path):
            os.unlink(path)
        raise


def _all_there(sources: str) -> bool:
    """Every layer of the list is still a directory; not so for a list that was cut short."""
    with open(sources, encoding="utf-8") as file:
        text = file.read()
    try:
        return all(os.path.isdir(layer) for layer in json.loads(text))
    except ValueError:
        return False


def _remove_unusable(directory: str) -> None:
    """Images whose layers have been removed, and what a killed build left (called locked)."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(".partial"):
            os.unlink(path)
        elif name.endswith((".merged", ".empty")):
            os.rmdir(path)
        elif name.endswith(".erofs.json") and not _all_there(path):
            os.unlink(path)
            image = path[: -len(".json")]
            if os.path.exists(image):
                os.unlink(image)
