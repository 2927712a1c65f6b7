"""The mount calls of Linux that CPython 3.11 lacks, and one step in another mount namespace.

A tree is a copy of a mount and of those below it, attached nowhere and held by a descriptor: it can
be made read-only before anybody sees it, carried into another namespace, and vanishes with its
descriptor. Needs Linux 5.12 (mount_setattr). Numbers are those of <linux/mount.h>, <linux/fcntl.h>,
<linux/sched.h> and, the same on every architecture since 5.1, <asm/unistd.h>.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading

from vmcell_protos.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
MS_SLAVE = 1 << 19
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_MOUNT_ATTR = struct.Struct("=QQQQ")  # set, clear, propagation, user namespace

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def open_tree(path: str, *, recursive: bool) -> int:
    """A tree of the mount at `path`, symlinks followed; the caller closes it. OSError."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _call(_SYS_OPEN_TREE, _AT_FDCWD, path, flags)


def set_attributes(fd: int, attributes: int, propagation: int, *, recursive: bool) -> None:
    """MOUNT_ATTR_* on the mount `fd` is open on, and on those below it. OSError."""
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    argument = _MOUNT_ATTR.pack(attributes, 0, propagation, 0)
    _call(_SYS_MOUNT_SETATTR, fd, "", flags, argument, len(argument))


def attach(tree: int, path: str) -> None:
    """Puts a tree on `path`, a directory or a file as its root is one. OSError."""
    _call(_SYS_MOVE_MOUNT, tree, "", _AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH)


def detach(path: str) -> None:
    """Lazily unmounts what is at `path` and below; does not wait for anything. OSError."""
    _check(_libc.umount2(ctypes.c_char_p(os.fsencode(path)), MNT_DETACH))


def in_namespace_of(pidfd: int, step: Callable[[], None], what: str, timeout_s: float) -> None:
    """Runs `step` in the mount namespace of a process, with its root as root."""

    def entered() -> None:
        # Threads share root and directory; the call below refuses until this one has its own.
        _check(_libc.unshare(CLONE_FS))
        _check(_libc.setns(pidfd, CLONE_NEWNS))
        step()

    in_time(entered, what, timeout_s)


def in_time(step: Callable[[], None], what: str, timeout_s: float) -> None:
    """Runs `step` in a thread of its own: a path on a file system that hangs stops only that one.

    HostError "<what>: <reason>" for an OSError or when it takes longer.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001, raised below in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise HostError(
            f"{what}: it took longer than {timeout_s:g} s; does its file system answer?",
            code="deadline_exceeded",
        )
    if raised and isinstance(raised[0], OSError):
        raise HostError(f"{what}: {raised[0].strerror or raised[0]}") from raised[0]
    if raised:
        raise raised[0]


def _call(number: int, *arguments: int | str | bytes) -> int:
    converted = [
        ctypes.c_long(argument)
        if isinstance(argument, int)
        else ctypes.c_char_p(os.fsencode(argument))
        for argument in arguments
    ]
    return _check(_libc.syscall(ctypes.c_long(number), *converted))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
