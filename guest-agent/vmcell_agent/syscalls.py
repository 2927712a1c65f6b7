"""The system calls CPython 3.11 lacks, each a checked function over glibc.

Every prototype carries `errcheck`: a result of -1 raises OSError, no caller can forget it. Buffers
that the kernel reads are bytes; the one it writes (statfs) is a fixed buffer of this module's own.
"""

from __future__ import annotations

import ctypes
import os

from vmcell_agent import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_STATFS_BYTES = 120  # sizeof(struct statfs), x86-64; f_type is its first long


def _check(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prototype(name: str, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.argtypes = arguments
    function.restype = ctypes.c_int
    function.errcheck = _check
    return function


_mount = _prototype(
    "mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p
)
_umount2 = _prototype("umount2", ctypes.c_char_p, ctypes.c_int)
_unshare = _prototype("unshare", ctypes.c_int)
_setns = _prototype("setns", ctypes.c_int, ctypes.c_int)
_capset = _prototype("capset", ctypes.c_char_p, ctypes.c_char_p)
_setdomainname = _prototype("setdomainname", ctypes.c_char_p, ctypes.c_size_t)
_statfs = _prototype("statfs", ctypes.c_char_p, ctypes.c_char_p)
_fstatfs = _prototype("fstatfs", ctypes.c_int, ctypes.c_char_p)
_reboot = _prototype("reboot", ctypes.c_int)
_syncfs = _prototype("syncfs", ctypes.c_int)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); empty strings become NULL."""
    _mount(
        source.encode() or None,
        target.encode(),
        fstype.encode() or None,
        flags,
        data.encode() or None,
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _umount2(target.encode(), flags)


def _syscall(number: int, *arguments: int | str | bytes) -> int:
    """A call that glibc 2.36 does not wrap."""
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, int):
            converted.append(ctypes.c_long(argument))
        else:
            data = argument.encode() if isinstance(argument, str) else argument
            converted.append(ctypes.c_char_p(data))
    return _check(_libc.syscall(ctypes.c_long(number), *converted), None, ())


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _syscall(abi.SYS_PIVOT_ROOT, new_root, put_old)


def clone_tree(path: str, directory: int = abi.AT_FDCWD) -> int:
    """open_tree(2): a descriptor of a copy of the mount at `path`, attached nowhere; a symlink is
    not followed. The caller closes it."""
    flags = abi.OPEN_TREE_CLONE | os.O_CLOEXEC | abi.AT_SYMLINK_NOFOLLOW
    return _syscall(abi.SYS_OPEN_TREE, directory, path, flags)


def attach_tree(tree: int, path: str, *, beneath: bool = False) -> None:
    """move_mount(2): put what `clone_tree` gave on `path`, or beneath the mount that is there."""
    flags = abi.MOVE_MOUNT_F_EMPTY_PATH | (abi.MOVE_MOUNT_BENEATH if beneath else 0)
    _syscall(abi.SYS_MOVE_MOUNT, tree, "", abi.AT_FDCWD, path, flags)


def set_tree_read_only(tree: int) -> None:
    """mount_setattr(2) on what `clone_tree` gave."""
    attributes = abi.MOUNT_ATTR.pack(abi.MOUNT_ATTR_RDONLY, 0, 0, 0)
    _syscall(abi.SYS_MOUNT_SETATTR, tree, "", abi.AT_EMPTY_PATH, attributes, len(attributes))


def make_all_writable_and_private() -> None:
    """mount_setattr(2) on every mount of the namespace; super blocks stay as they are."""
    attributes = abi.MOUNT_ATTR.pack(0, abi.MOUNT_ATTR_RDONLY, abi.MS_PRIVATE, 0)
    _syscall(
        abi.SYS_MOUNT_SETATTR, abi.AT_FDCWD, "/", abi.AT_RECURSIVE, attributes, len(attributes)
    )


def unshare(flags: int) -> None:
    """unshare(2)."""
    _unshare(flags)


def setns(fd: int, flags: int) -> None:
    """setns(2) with a namespace's descriptor or a pidfd."""
    _setns(fd, flags)


def prctl(option: int, argument: int, third: int = 0) -> None:
    """prctl(2) with integer arguments."""
    zero = ctypes.c_ulong(0)
    arguments = (ctypes.c_ulong(argument), ctypes.c_ulong(third), zero, zero)
    _check(_libc.prctl(option, *arguments), None, ())


def set_process_name(name: str) -> None:
    """What `ps` shows as the command's name; the kernel keeps 15 bytes."""
    _check(_libc.prctl(abi.PR_SET_NAME, ctypes.c_char_p(name.encode()[:15])), None, ())


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) of the calling thread; each argument is a set of bits."""
    low = [bits & 0xFFFFFFFF for bits in (effective, permitted, inheritable)]
    high = [bits >> 32 for bits in (effective, permitted, inheritable)]
    header = abi.CAP_HEADER.pack(abi.LINUX_CAPABILITY_VERSION_3, 0)
    _capset(header, abi.CAP_DATA.pack(*low, *high))


def syncfs(fd: int) -> None:
    """syncfs(2): everything of the file system that `fd` lies on is on its disk."""
    _syncfs(fd)


def setdomainname(name: str) -> None:
    """setdomainname(2)."""
    encoded = name.encode()
    _setdomainname(encoded, len(encoded))


def filesystem_magic(target: int | str) -> int:
    """`f_type` of the file system that a path or a descriptor lies on (<linux/magic.h>)."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if isinstance(target, int):
        _fstatfs(target, buffer)
    else:
        _statfs(target.encode(), buffer)
    return int.from_bytes(buffer.raw[:8], "little")


def reboot() -> None:
    """reboot(2), RB_AUTOBOOT: returns only by raising."""
    _reboot(abi.RB_AUTOBOOT)
