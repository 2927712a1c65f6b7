"""The layers of a root: directories, or EROFS images, by names that last.

A snapshotter may mount its images on the host and name the mount points, which differ with every
container; the image behind such a mount is the layer then. A committed layer never changes, so its
real path, inode and change time say which one it is, for as long as it is there.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.erofs_superblock import HEAD_BYTES, Superblock, parse_superblock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """`path` is real (no links); an image has `superblock`, a directory None."""

    path: str
    superblock: Superblock | None

    @property
    def identity(self) -> tuple[str, int, int]:
        """Real path, inode, change time in ns; raises HostError when it is gone.

        No device number: that of one and the same disk may be another after a restart.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise HostError(f"layer {self.path} of the image cannot be read: {error}") from error
        return self.path, status.st_ino, status.st_ctime_ns


def find_layers(paths: Iterable[str]) -> tuple[Layer, ...]:
    """The layers that `paths` name; raises CallerError for what is neither directory nor image,
    HostError for what cannot be read."""
    return tuple(_find_layer(path) for path in paths)


def _find_layer(path: str) -> Layer:
    real = os.path.realpath(path)
    try:
        kind = os.stat(real).st_mode
        if stat.S_ISDIR(kind) and os.path.ismount(real):
            image = _mounted_image(real, _mount_table())
            superblock = read_superblock(image) if image else None
            if superblock is not None:
                return Layer(path=os.path.realpath(image), superblock=superblock)
        if stat.S_ISDIR(kind):
            return Layer(path=real, superblock=None)
        superblock = read_superblock(real) if stat.S_ISREG(kind) else None
    except OSError as error:
        raise HostError(f"layer {path} of the image cannot be read: {error}") from error
    if superblock is None:
        raise CallerError(f"layer {path} of the root is neither a directory nor an EROFS image")
    return Layer(path=real, superblock=superblock)


def read_superblock(path: str) -> Superblock | None:
    """That of a whole EROFS image; None for another file and for one that was cut short."""
    with open(path, "rb") as file:
        superblock = parse_superblock(file.read(HEAD_BYTES))
        length = os.fstat(file.fileno()).st_size
    return superblock if superblock and superblock.length_bytes <= length else None


def _mount_table() -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return file.readlines()


def _mounted_image(mount_point: str, table: list[str]) -> str:
    """The file that is mounted as EROFS on `mount_point` as a whole, "" for anything else.

    proc(5): ... root, mount point, options, fields that end with "-", type, source, options.
    """
    image = ""
    for line in table:
        left, _, right = line.partition(" - ")
        # A source may be empty, so blanks count one by one.
        fields, (kind, source, options) = left.split(" "), right.split(" ")[:3]
        if _plain(fields[4]) != mount_point:
            continue
        # The last mount on a place is the one that is seen.
        alone = kind == "erofs" and fields[3] == "/" and "device=" not in options
        image = _backing_file(_plain(source)) if alone else ""
    return image if image and os.path.isfile(image) else ""


def _backing_file(source: str) -> str:
    """The image itself (Linux 6.12 mounts files), or the one behind a loop device."""
    if not source.startswith("/dev/loop"):
        return source
    try:
        with open(f"/sys/block/{os.path.basename(source)}/loop/backing_file") as file:
            return file.read().rstrip("\n")
    except FileNotFoundError:
        return ""


def _plain(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal numbers."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
