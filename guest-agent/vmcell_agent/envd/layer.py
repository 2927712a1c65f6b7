"""What has changed in the sandbox's root since the last time it was asked, as a layer of an image.

Only the builder (`serve.run_builder`) has it. The root is an overlay; its upper directory, reached
by a descriptor that no path in the container leads to, holds what was written. A layer is a tar of
the upper's entries that are new or changed, with OCI whiteouts for what has gone (image-spec 1.0,
layer.md). The first layer is counted from the moment envd was started, so files that the host put
there are not in it.

The overlay is mounted with `userxattr`, because reading `trusted.*` takes a right that a container
does not have: an opaque directory carries `user.overlay.opaque` (Linux overlayfs.rst).
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

PIECE_BYTES = 256 * 1024
OVERLAY_XATTRS = ("user.overlay.", "trusted.overlay.")
_OPAQUE = "user.overlay.opaque"
# With either an entry of the upper is not what it seems; this mount never makes them.
_FOREIGN = ("user.overlay.redirect", "user.overlay.metacopy")
_WHITEOUT_PREFIX, _OPAQUE_MARK = ".wh.", ".wh..wh..opq"
_BLOCK_BYTES = 512
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


class LayerError(Exception):
    """The upper directory cannot be read as a layer; the words say which entry, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What tells one state of a path from another; a whiteout is like every other one."""

    kind: int
    inode: int = 0
    changed_ns: int = 0
    size: int = 0
    opaque: bool = False


_WHITEOUT = Entry(kind=-1)
Index = dict[str, Entry]


class UpperDirectory:
    """Owns a descriptor of the overlay's upper directory; `pieces` may be used once at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._index = dict(self._walk())

    def pieces(self) -> Iterator[bytes]:
        """The tar of the next layer. What it holds counts as taken once the iterator has ended.

        Raises LayerError, or OSError when a file cannot be read.
        """
        present: Index = {}
        fresh: set[str] = set()
        links: dict[int, str] = {}
        for path, entry in self._walk():
            present[path] = entry
            known = self._index.get(path)
            if entry == known and _parent(path) not in fresh:
                continue
            is_new = _replaces(entry, known) or _parent(path) in fresh
            if entry.kind == stat.S_IFDIR and is_new:
                fresh.add(path)
            yield from self._members(path, entry, known, links)
        for path in sorted(self._gone(present)):
            yield _header(_whiteout(path))
        yield bytes(2 * _BLOCK_BYTES)
        self._index = present

    def _gone(self, present: Index) -> Iterator[str]:
        """Paths of earlier layers that are there no more, below directories that still are."""
        for path in self._index:
            parent = _parent(path)
            above = present.get(parent)
            if path not in present and (not parent or (above and above.kind == stat.S_IFDIR)):
                yield path

    def _members(
        self, path: str, entry: Entry, known: Entry | None, links: dict[int, str]
    ) -> Iterator[bytes]:
        if entry == _WHITEOUT:
            yield _header(_whiteout(path))
        elif entry.kind == stat.S_IFREG:
            yield from self._file(path, entry, links)
        else:
            yield _header(self._described(path, entry))
            if entry.opaque and _replaces(entry, known):
                yield _header(_marker(f"{path}/{_OPAQUE_MARK}"))

    def _described(self, path: str, entry: Entry) -> tarfile.TarInfo:
        """A member without content."""
        status = os.stat(path, dir_fd=self._descriptor, follow_symlinks=False)
        info = _info(path, status)
        if entry.kind == stat.S_IFLNK:
            info.linkname = os.readlink(path, dir_fd=self._descriptor)
        elif entry.kind == stat.S_IFDIR:
            descriptor = os.open(path, _OPEN | os.O_DIRECTORY, dir_fd=self._descriptor)
            try:
                info.pax_headers = _xattrs(descriptor)
            finally:
                os.close(descriptor)
        return info

    def _file(self, path: str, entry: Entry, links: dict[int, str]) -> Iterator[bytes]:
        descriptor = os.open(path, _OPEN, dir_fd=self._descriptor)
        try:
            status = os.fstat(descriptor)
            if status.st_ino != entry.inode:
                raise LayerError(f"{path!r} was replaced while it was read")
            info = _info(path, status)
            if status.st_nlink > 1 and status.st_ino in links:
                info.type, info.linkname, info.size = tarfile.LNKTYPE, links[status.st_ino], 0
                yield _header(info)
                return
            links[status.st_ino] = path
            info.size = status.st_size
            info.pax_headers = _xattrs(descriptor)
            yield _header(info)
            yield from _content(path, descriptor, status.st_size)
        finally:
            os.close(descriptor)

    def _walk(self) -> Iterator[tuple[str, Entry]]:
        """Every path below the upper with its state, each directory before what is in it."""
        waiting = [""]
        while waiting:
            directory = waiting.pop()
            descriptor = os.open(directory or ".", _OPEN | os.O_DIRECTORY, dir_fd=self._descriptor)
            try:
                names = sorted(os.listdir(descriptor))
            finally:
                os.close(descriptor)
            below = []
            for name in names:
                path = f"{directory}/{name}" if directory else name
                entry = self._look(path)
                if entry is None:
                    continue
                yield path, entry
                if entry.kind == stat.S_IFDIR:
                    below.append(path)
            waiting += reversed(below)

    def _look(self, path: str) -> Entry | None:
        """The state of a path; None for a socket, which no layer can hold, and for what has gone
        since its directory was read."""
        try:
            status = os.stat(path, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFCHR and status.st_rdev == 0:
            return _WHITEOUT
        if kind not in _KINDS:
            return None
        opaque = kind == stat.S_IFDIR and self._is_opaque(path)
        return Entry(
            kind=kind,
            inode=status.st_ino,
            changed_ns=status.st_ctime_ns,
            size=0 if kind == stat.S_IFDIR else status.st_size,
            opaque=opaque,
        )

    def _is_opaque(self, path: str) -> bool:
        descriptor = os.open(path, _OPEN | os.O_DIRECTORY, dir_fd=self._descriptor)
        try:
            names = os.listxattr(descriptor)
            for name in _FOREIGN:
                if name in names:
                    raise LayerError(f"{path!r} has {name}, which no layer can say")
            return _OPAQUE in names and os.getxattr(descriptor, _OPAQUE) == b"y"
        finally:
            os.close(descriptor)


def _replaces(entry: Entry, known: Entry | None) -> bool:
    """Whether a directory is another one than was there: all below it is new then."""
    return known is None or known.inode != entry.inode or (entry.opaque and not known.opaque)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _whiteout(path: str) -> tarfile.TarInfo:
    parent, _, name = path.rpartition("/")
    return _marker(f"{parent}/{_WHITEOUT_PREFIX}{name}" if parent else _WHITEOUT_PREFIX + name)


def _marker(path: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mode = 0
    return info


def _info(path: str, status: os.stat_result) -> tarfile.TarInfo:
    if os.path.basename(path).startswith(_WHITEOUT_PREFIX):
        raise LayerError(f"{path!r} cannot be in a layer: the name means that a file is removed")
    info = tarfile.TarInfo(path)
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    info.mtime = status.st_mtime_ns // 1_000_000_000
    info.type = _KINDS[stat.S_IFMT(status.st_mode)]
    if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return info


def _xattrs(descriptor: int) -> dict[str, str]:
    """Extended attributes as records of a pax header (as libarchive and Go's tar have them)."""
    return {
        f"SCHILY.xattr.{name}": os.getxattr(descriptor, name).decode("utf-8", "surrogateescape")
        for name in os.listxattr(descriptor)
        if not name.startswith(OVERLAY_XATTRS) and not name.startswith("system.")
    }


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _content(path: str, descriptor: int, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of the file, filled up to a whole block."""
    left = size
    while left:
        piece = os.read(descriptor, min(PIECE_BYTES, left))
        if not piece:
            raise LayerError(f"{path!r} became shorter while it was read")
        left -= len(piece)
        yield piece
    if size % _BLOCK_BYTES:
        yield bytes(_BLOCK_BYTES - size % _BLOCK_BYTES)
