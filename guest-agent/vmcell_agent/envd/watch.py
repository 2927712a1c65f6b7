"""Watching one directory, with all below it if asked, including what is made later.

Events are those of inotify in its order, named as fsnotify (and so E2B) names them. A directory
made under a recursive watch is watched a moment after it appears; what was put into it meanwhile
is found by looking, so no `create` is lost and none is told twice.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from contextlib import suppress

from vmcell_protos.errors import CallerError

from .inotify import (
    IN_ATTRIB,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_ISDIR,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
    Inotify,
    InotifyEvent,
)
from .loop import READABLE, Loop

CREATE, WRITE, REMOVE, RENAME, CHMOD = (
    f"EVENT_TYPE_{name}" for name in ("CREATE", "WRITE", "REMOVE", "RENAME", "CHMOD")
)
_KINDS = (
    (IN_CREATE | IN_MOVED_TO, CREATE),
    (IN_MODIFY, WRITE),
    (IN_DELETE | IN_DELETE_SELF, REMOVE),
    (IN_MOVED_FROM | IN_MOVE_SELF, RENAME),
    (IN_ATTRIB, CHMOD),
)
# Events of other machines never reach inotify (E2B refuses these unless asked not to).
_NETWORK_TYPES = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "virtiofs", "fuse")


def file_system_type(path: str) -> str:
    """The type of the mount `path` lies on, by /proc/self/mountinfo (proc(5)); "" if unknown."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            fields = line.split(" ")
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return ""


def is_network_mount(path: str) -> bool:
    kind = file_system_type(path)
    return kind in _NETWORK_TYPES or kind.startswith("fuse.")


class DirectoryWatch:
    """Calls `on_event(kind, full path, name relative to the root)`; owns its inotify instance.

    `on_lost` is called when the kernel dropped events. Raises OSError when the root cannot be
    watched, or the instances of the kernel are used up.
    """

    def __init__(
        self,
        loop: Loop,
        root: str,
        *,
        recursive: bool,
        on_event: Callable[[str, str, str], None],
        on_lost: Callable[[CallerError], None],
    ) -> None:
        self._loop = loop
        self._root = root
        self._recursive = recursive
        self._on_event = on_event
        self._on_lost = on_lost
        self._paths: dict[int, str] = {}
        # Names told from looking, whose own event may still come.
        self._told: set[str] = set()
        self._inotify = Inotify()
        try:
            self._add(root)
            if recursive:
                self._add_below(root)
        except BaseException:
            self._inotify.close()
            raise
        loop.watch(self._inotify.descriptor, READABLE, self._on_readable)

    def close(self) -> None:
        """No event after it; idempotent."""
        if self._inotify.descriptor >= 0:
            self._loop.forget(self._inotify.descriptor)
            self._inotify.close()

    def _is_open(self) -> bool:
        return self._inotify.descriptor >= 0

    def poll(self) -> None:
        """Take what the kernel has now, instead of in the loop's next turn."""
        self._on_readable(READABLE)

    def _add(self, directory: str) -> None:
        self._paths[self._inotify.add(directory)] = directory

    def _add_below(self, directory: str, found: list[str] | None = None) -> None:
        """Watch all directories below; `found` gathers the entries seen on the way."""
        pending = [directory]
        while pending:
            current = pending.pop()
            try:
                with os.scandir(current) as entries:
                    children = [
                        (entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries
                    ]
            except OSError:
                # Gone already.
                continue
            for path, is_directory in children:
                if found is not None:
                    found.append(path)
                if is_directory:
                    try:
                        self._add(path)
                    except (FileNotFoundError, NotADirectoryError, PermissionError):
                        continue
                    pending.append(path)

    def _on_readable(self, mask: int) -> None:
        while self._is_open():
            events = self._inotify.read()
            if not events:
                # Whatever had been told from looking has had its own event by now, or has none.
                self._told.clear()
                return
            for event in events:
                if self._is_open():
                    self._take(event)

    def _take(self, event: InotifyEvent) -> None:
        if event.mask & IN_Q_OVERFLOW:
            self._on_lost(CallerError("events were lost: too many at once", code="data_loss"))
            return
        directory = self._paths.get(event.watch)
        if event.mask & IN_IGNORED:
            self._paths.pop(event.watch, None)
        if directory is None or event.mask & IN_IGNORED:
            return
        if not event.name and (directory != self._root or event.mask & IN_ATTRIB):
            # The parent tells of a directory below; a change of the root's own mode is no entry's.
            return
        path = posixpath.join(directory, event.name) if event.name else directory
        if event.mask & IN_CREATE and path in self._told:
            self._told.discard(path)
            return
        for bits, kind in _KINDS:
            if event.mask & bits:
                self._tell(kind, path)
        if self._recursive and event.mask & IN_ISDIR and event.name:
            self._follow(event.mask, path)

    def _tell(self, kind: str, path: str) -> None:
        if self._is_open():
            self._on_event(kind, path, posixpath.relpath(path, self._root))

    def _follow(self, mask: int, path: str) -> None:
        """Keep the set of watched directories that of the tree."""
        if mask & IN_MOVED_FROM:
            gone = [
                watch
                for watch, known in self._paths.items()
                if known == path or known.startswith(path + "/")
            ]
            for watch in gone:
                del self._paths[watch]
                self._inotify.remove(watch)
        elif mask & (IN_CREATE | IN_MOVED_TO):
            found: list[str] = []
            try:
                self._add(path)
                self._add_below(path, found)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return
            except OSError as error:
                self._on_lost(
                    CallerError(f"cannot watch '{path}': {error.strerror}", code="data_loss")
                )
                return
            if mask & IN_CREATE:
                for entry in found:
                    self._told.add(entry)
                    self._tell(CREATE, entry)
