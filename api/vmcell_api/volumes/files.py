"""The verbs on the files of one volume.

Each resolves its path once, by the kernel, to an open directory and a last name, and then works on
that name without following it. Two clients, or a client and a guest, may race; then one of them
finds the file gone or another file of the same volume, never one outside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from vmcell_api.volumes import clearing, folders, listing
from vmcell_api.volumes.entries import Entry, look, shown_path
from vmcell_api.volumes.file_errors import translate
from vmcell_api.volumes.names import VOLUME_ID
from vmcell_api.volumes.syscalls import open_beneath
from vmcell_api.volumes.upload import Upload
from vmcell_protos.errors import CallerError, VmcellError

FILE_MODE, DIRECTORY_MODE = 0o644, 0o755
MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255
_FOLDER = os.O_PATH | os.O_DIRECTORY

Parts = tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """Owner and mode of what is made; None: E2B's user, and 0644 or 0755."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


def parse_path(text: str) -> Parts:
    """A client's path from the volume's root on, relative or absolute; raises CallerError."""
    if "\0" in text:
        raise CallerError("path has a NUL in it; leave it out")
    try:
        parts = tuple(p for p in text.encode().split(b"/") if p not in (b"", b"."))
    except UnicodeEncodeError as error:
        raise CallerError("path is not UTF-8") from error
    if b".." in parts:
        raise CallerError(f"path {text[:80]!r} has a .. in it; write the path plainly")
    if any(len(part) > MAX_NAME_BYTES for part in parts):
        raise CallerError(f"path {text[:80]!r}: a name has at most {MAX_NAME_BYTES} bytes")
    if sum(len(part) + 1 for part in parts) > MAX_PATH_BYTES:
        raise CallerError(f"path {text[:80]!r}...: a path has at most {MAX_PATH_BYTES} bytes")
    return parts


class Volumes:
    """All volumes under one directory, held open. `close()` is idempotent; thread-safe.

    `owner` is uid and gid of what is made without saying whose it is.
    """

    def __init__(self, directory: str, owner: tuple[int, int] = folders.OWNER) -> None:
        self._owner = owner
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        names = (folders.DATA, folders.TRASH, folders.UPLOADS)
        self._open = [os.open(f"{directory.rstrip('/')}/{name}", flags) for name in names]

    def close(self) -> None:
        """Closes the directories."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []

    @contextlib.contextmanager
    def volume(self, volume_id: str) -> Iterator[VolumeFiles]:
        """The files of one volume, inside the block; CallerError not_found."""
        data, trash, uploads = self._open
        missing = CallerError(f"volume {volume_id[:40]!r} was not found", code="not_found")
        if not VOLUME_ID.fullmatch(volume_id):
            raise missing
        try:
            root = open_beneath(data, volume_id.encode(), _FOLDER)
        except FileNotFoundError as error:
            raise missing from error
        try:
            yield VolumeFiles(root, trash=trash, uploads=uploads, owner=self._owner)
        finally:
            os.close(root)


class VolumeFiles:
    """One volume; every verb raises CallerError, HostError or VolumeFull."""

    def __init__(self, root: int, *, trash: int, uploads: int, owner: tuple[int, int]) -> None:
        self._root = root
        self._owner = owner
        self._trash = trash
        self._uploads = uploads

    def look(self, parts: Parts) -> Entry:
        """What is at the path."""
        with self._parent(parts) as (parent, name):
            return look(parent, name, parts[:-1]) if name else self._root_entry()

    def change(self, parts: Parts, wanted: Ownership) -> Entry:
        """Sets owner and mode of a file or directory, as far as they are given."""
        with _opened(self._root, parts, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
            if wanted.uid is not None or wanted.gid is not None:
                uid = -1 if wanted.uid is None else wanted.uid
                os.fchown(fd, uid, -1 if wanted.gid is None else wanted.gid)
            if wanted.mode is not None:
                os.fchmod(fd, wanted.mode)
            return Entry(parts=parts, status=os.fstat(fd))

    def remove(self, parts: Parts) -> None:
        """Removes what is at the path, a directory with all that is in it, a link itself."""
        with self._parent(parts) as (parent, name):
            if not name:
                raise CallerError("the root of a volume cannot be removed; delete the volume")
            clearing.clear(self._trash, clearing.throw_away(parent, os.fsdecode(name), self._trash))

    def list(self, parts: Parts, depth: int) -> list[Entry]:
        """What is in a directory, `depth` levels deep."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK
        with _opened(self._root, parts, flags) as fd:
            return listing.list_tree(fd, parts, depth)

    def make_directory(self, parts: Parts, wanted: Ownership, *, force: bool) -> Entry:
        """Makes a directory; with `force` its parents too, and one that is there will do."""
        if force:
            self._make_parents(parts, wanted)
        with self._parent(parts) as (parent, name):
            if not name:
                if force:
                    return self._root_entry()
                raise CallerError("/: it exists already", code="already_exists")
            try:
                self._make_directory(parent, name, wanted)
            except FileExistsError:
                entry = look(parent, name, parts[:-1])
                if not force or not stat.S_ISDIR(entry.status.st_mode):
                    raise
                return entry
            return look(parent, name, parts[:-1])

    @contextlib.contextmanager
    def open_file(self, parts: Parts) -> Iterator[tuple[int, os.stat_result]]:
        """A file to be read; the descriptor is open inside the block."""
        with _opened(self._root, parts, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CallerError(f"{shown_path(parts)}: it is a directory; list it instead")
            yield fd, status

    def check_writable(self, parts: Parts, *, force: bool) -> None:
        """Raises what `put` would, as far as it is known before the body."""
        with self._parent(parts, may_miss=force) as (parent, name):
            if not name:
                raise CallerError("/: it is a directory")
            if parent < 0:
                return
            try:
                mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return
            if not stat.S_ISREG(mode):
                raise CallerError(f"{shown_path(parts)}: it is no file, and is not replaced by one")
            if not force:
                raise FileExistsError(errno.EEXIST, "a file")

    @contextlib.contextmanager
    def upload(self) -> Iterator[Upload]:
        """A new file without a place, gone at the end of the block unless it got one."""
        with _translated(()):
            upload = Upload(self._uploads)
        try:
            yield upload
        finally:
            upload.close()

    def put(self, upload: Upload, parts: Parts, wanted: Ownership, *, force: bool) -> Entry:
        """Puts an upload in its place; with `force` makes parents and replaces a file."""
        self.check_writable(parts, force=force)
        if force:
            self._make_parents(parts, wanted)
        with self._parent(parts) as (parent, name):
            upload.place(
                parent,
                name,
                uid=self._owner[0] if wanted.uid is None else wanted.uid,
                gid=self._owner[1] if wanted.gid is None else wanted.gid,
                mode=FILE_MODE if wanted.mode is None else wanted.mode,
                replace=force,
            )
            return look(parent, name, parts[:-1])

    def _root_entry(self) -> Entry:
        return Entry(parts=(), status=os.stat(".", dir_fd=self._root))

    def _make_parents(self, parts: Parts, wanted: Ownership) -> None:
        owner = Ownership(uid=wanted.uid, gid=wanted.gid)
        with _translated(parts):
            folder = open_beneath(self._root, b".", _FOLDER)
            try:
                for name in parts[:-1]:
                    with contextlib.suppress(FileExistsError):
                        self._make_directory(folder, name, owner)
                    lower = open_beneath(folder, name, _FOLDER)
                    os.close(folder)
                    folder = lower
            finally:
                os.close(folder)

    def _make_directory(self, parent: int, name: bytes, wanted: Ownership) -> None:
        """Raises OSError; FileExistsError for a name that is taken."""
        os.mkdir(name, 0o700, dir_fd=parent)
        fd = open_beneath(parent, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            uid = self._owner[0] if wanted.uid is None else wanted.uid
            gid = self._owner[1] if wanted.gid is None else wanted.gid
            status = os.fstat(fd)
            if (status.st_uid, status.st_gid) != (uid, gid):
                os.fchown(fd, uid, gid)
            os.fchmod(fd, DIRECTORY_MODE if wanted.mode is None else wanted.mode)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _parent(self, parts: Parts, *, may_miss: bool = False) -> Iterator[tuple[int, bytes]]:
        """The open directory that holds the path, and the last name; b"" for the root itself.

        With `may_miss` the directory is -1 where there is none. OSErrors of the block are
        translated.
        """
        with _translated(parts):
            try:
                parent = open_beneath(self._root, b"/".join(parts[:-1]) or b".", _FOLDER)
            except FileNotFoundError:
                if not may_miss:
                    raise
                yield -1, parts[-1]
                return
            try:
                yield parent, parts[-1] if parts else b""
            finally:
                os.close(parent)


@contextlib.contextmanager
def _opened(root: int, parts: Parts, flags: int) -> Iterator[int]:
    """A file or directory, open inside the block; anything else is refused before it is opened,
    because to open a FIFO or a device may do something."""
    with _translated(parts):
        path = b"/".join(parts) or b"."
        seen = open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            mode = os.fstat(seen).st_mode
        finally:
            os.close(seen)
        _check_kind(mode, parts)
        fd = open_beneath(root, path, flags | os.O_NOFOLLOW)
        try:
            _check_kind(os.fstat(fd).st_mode, parts)
            yield fd
        finally:
            os.close(fd)


def _check_kind(mode: int, parts: Parts) -> None:
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "a symbolic link")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise CallerError(f"{shown_path(parts)}: it is neither a file nor a directory")


@contextlib.contextmanager
def _translated(parts: Parts) -> Iterator[None]:
    try:
        yield
    except VmcellError:
        raise
    except OSError as error:
        raise translate(error, shown_path(parts)[:200]) from error
