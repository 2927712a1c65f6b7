"""inotify(7): the three calls, and the bytes of its events."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

# <sys/inotify.h>
IN_MODIFY = 0x00000002
IN_ATTRIB = 0x00000004
IN_MOVED_FROM = 0x00000040
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
IN_DELETE = 0x00000200
IN_DELETE_SELF = 0x00000400
IN_MOVE_SELF = 0x00000800
IN_Q_OVERFLOW = 0x00004000
IN_IGNORED = 0x00008000
IN_ONLYDIR = 0x01000000
IN_ISDIR = 0x40000000

WATCHED = (
    IN_MODIFY
    | IN_ATTRIB
    | IN_MOVED_FROM
    | IN_MOVED_TO
    | IN_CREATE
    | IN_DELETE
    | IN_DELETE_SELF
    | IN_MOVE_SELF
)

# struct inotify_event: wd, mask, cookie, length of the name that follows.
_HEADER = struct.Struct("=iIII")
_READ_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)
_init = _libc.inotify_init1
_init.argtypes, _init.restype = (ctypes.c_int,), ctypes.c_int
_add = _libc.inotify_add_watch
_add.argtypes, _add.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32), ctypes.c_int
_remove = _libc.inotify_rm_watch
_remove.argtypes, _remove.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int


class InotifyEvent(NamedTuple):
    """One event; `name` is empty when the watched directory itself is meant."""

    watch: int
    mask: int
    name: str


def parse_events(data: bytes) -> list[InotifyEvent]:
    """What one read(2) returned: whole events, names padded with NULs."""
    events = []
    at = 0
    while at < len(data):
        watch, mask, _, length = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        name = data[at : at + length].rstrip(b"\0")
        at += length
        events.append(InotifyEvent(watch, mask, os.fsdecode(name)))
    return events


def _checked(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


class Inotify:
    """Owns one inotify instance; `close()` is idempotent. All methods raise OSError."""

    def __init__(self) -> None:
        self.descriptor = _checked(_init(os.O_NONBLOCK | os.O_CLOEXEC))

    def add(self, directory: str) -> int:
        """Watch the directory's entries; the watch's number, the same one for the same inode."""
        path = os.fsencode(directory)
        return _checked(_add(self.descriptor, path, WATCHED | IN_ONLYDIR), directory)

    def remove(self, watch: int) -> None:
        """Nothing happens when the kernel has dropped it already."""
        _remove(self.descriptor, watch)

    def read(self) -> list[InotifyEvent]:
        """Events that wait, [] when none do."""
        try:
            return parse_events(os.read(self.descriptor, _READ_BYTES))
        except BlockingIOError:
            return []

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
