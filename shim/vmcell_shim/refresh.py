"""Copies of host files kept like their sources: pushed into the guest when these change, and what
the container wrote into them is written back when it ends.

One thread a container, asleep in inotify(7). A source is watched by the directory it lies in and,
if it is a tree, by every directory of it: kubelet replaces a config map by renaming a link, others
write files in place. A change is pushed as whole files, so a reader in the guest sees old or new.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading

from vmcell_protos.agent import FileCopy
from vmcell_shim.binds import BindCopy, try_read_copies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Push = Callable[[list[FileCopy]], None]
    Read = Callable[[str], bytes | None]

# inotify(7), linux/inotify.h
_IN_MODIFY, _IN_ATTRIB, _IN_CLOSE_WRITE = 0x2, 0x4, 0x8
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_CHANGES = (
    _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE
) | _IN_DELETE
_EVENTS_BYTES = 64 << 10
# Writers take several steps; the last one counts.
_SETTLE_S = 0.1
_libc = ctypes.CDLL(None, use_errno=True)


class Refresh:
    """The copied binds of one container. `push` sends changed files to the guest; its errors are
    its own to log. close() before the container goes."""

    def __init__(self, binds: list[BindCopy], push: Push) -> None:
        self._push = push
        self._binds = binds
        self._known = [{copy.destination: copy for copy in bind.files} for bind in binds]
        self._lock = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._inotify = -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watches from here on; what changed since the copies were read is pushed too."""
        if not self._binds:
            return
        self._inotify = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is pushed any more. Idempotent."""
        if self._stop < 0:
            return
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join()
            os.close(self._inotify)
        os.close(self._stop)
        self._stop = -1

    def write_back(self, read: Read) -> None:
        """Files of writable binds that the container has changed, written to their sources.

        `read` gives a file of the container as it is now, None when there is none. OSError as it
        comes.
        """
        for number, bind in enumerate(self._binds):
            if bind.read_only or any(copy.directory for copy in bind.files):
                continue
            content = read(bind.destination)
            with self._lock:
                unchanged = self._known[number][bind.destination].content
            if content is None or content == unchanged:
                continue
            # In place, as through the mount: whoever holds the file open sees it.
            fd = os.open(bind.source, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            with open(fd, "wb") as file:
                file.write(content)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            self._watch_all()
            self._push_changes()
            if self._stop in dict(poll.poll()):
                return
            settled = select.poll()
            settled.register(self._stop, select.POLLIN)
            if settled.poll(int(_SETTLE_S * 1000)):
                return
            self._drain()

    def _watch_all(self) -> None:
        """Watches that exist already are the same ones again (inotify_add_watch(2))."""
        for bind in self._binds:
            parent = os.path.dirname(bind.source.rstrip("/")) or "/"
            for path in (parent, *_directories(bind.source)):
                # One that has just gone is noticed by its parent's watch.
                _libc.inotify_add_watch(self._inotify, os.fsencode(path), _CHANGES)

    def _drain(self) -> None:
        try:
            while os.read(self._inotify, _EVENTS_BYTES):
                pass
        except BlockingIOError:
            return

    def _push_changes(self) -> None:
        for number, bind in enumerate(self._binds):
            files = try_read_copies(bind.source, bind.destination)
            if files is None:
                continue
            now = {copy.destination: copy for copy in files}
            with self._lock:
                before, self._known[number] = self._known[number], now
            changed = [copy for copy in files if before.get(copy.destination) != copy]
            gone = [
                FileCopy(destination=name, remove=True)
                for name in sorted(before.keys() - now.keys(), reverse=True)
            ]
            if changed or gone:
                self._push([*changed, *gone])


def _directories(source: str) -> list[str]:
    if not os.path.isdir(source):
        return [source]
    return [directory for directory, _, _ in os.walk(source)]


def _check(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
