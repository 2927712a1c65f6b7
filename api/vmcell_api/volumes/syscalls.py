"""The calls of Linux that CPython 3.11 lacks, for the volumes; all raise OSError.

`open_beneath` is openat2(2) (Linux 5.6): the kernel itself refuses a path that leaves the directory
or meets a symbolic link or another mount on its way, so no check of ours can be overtaken.
Numbers are those of <asm/unistd.h> (the same on every architecture for openat2; x86-64 and the
generic table differ for pivot_root and capset, hence by libc's names), <linux/openat2.h>,
<linux/mount.h>, <linux/prctl.h>, <linux/capability.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 8, 24, 38
LAST_CAPABILITY = 40

_SYS_OPENAT2 = 437
_SYS_PIVOT_ROOT = {"x86_64": 155}.get(os.uname().machine, 41)
_OPEN_HOW = struct.Struct("=QQQ")  # flags, mode, resolve
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 1, 2, 4, 8
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_HEADER = struct.Struct("=Ii")
_CAP_DATA = struct.Struct("=6I")  # effective, permitted, inheritable; twice, low half first
# A rename somewhere on the disk may make the kernel unsure; it then wants to be asked again.
_TRIES = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """A descriptor of `path` in `directory`, reached without any link; the caller closes it."""
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE)
    for _ in range(_TRIES - 1):
        try:
            return _call(_SYS_OPENAT2, directory, path, how, len(how))
        except BlockingIOError:
            continue
    return _call(_SYS_OPENAT2, directory, path, how, len(how))


def unshare(flags: int) -> None:
    """Gives this process namespaces of its own."""
    _check(_libc.unshare(flags))


def mount(source: str, target: str, flags: int) -> None:
    """mount(2) without type and data: binds, remounts, propagation."""
    _check(
        _libc.mount(
            ctypes.c_char_p(os.fsencode(source)),
            ctypes.c_char_p(os.fsencode(target)),
            None,
            ctypes.c_ulong(flags),
            None,
        )
    )


def pivot_root_here() -> None:
    """The current directory, a mount's root, becomes the root, and the old one is gone."""
    _call(_SYS_PIVOT_ROOT, b".", b".")
    _check(_libc.umount2(ctypes.c_char_p(b"."), MNT_DETACH))


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero))


def drop_bounding(keep: int) -> None:
    """Leaves only the capabilities of the bit set `keep` in the bounding set."""
    for number in range(64):
        if keep >> number & 1:
            continue
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno != errno.EINVAL or number <= LAST_CAPABILITY:
                raise  # EINVAL: a kernel without capabilities of that number and above


def set_capabilities(effective_and_permitted: int) -> None:
    """capset(2): these, nothing inheritable."""
    low, high = effective_and_permitted & 0xFFFFFFFF, effective_and_permitted >> 32
    header = _CAP_HEADER.pack(_CAPABILITY_VERSION_3, 0)
    data = _CAP_DATA.pack(low, low, 0, high, high, 0)
    _check(_libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(data)))


def _call(number: int, *arguments: int | bytes) -> int:
    converted = [
        ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_char_p(argument)
        for argument in arguments
    ]
    return _check(_libc.syscall(ctypes.c_long(number), *converted))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
