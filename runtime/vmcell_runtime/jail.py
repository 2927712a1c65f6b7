"""What a VMM gives up before its guest runs, in this order:

 1  descriptors   closed, but for the shim's socket, the log, /dev/null (`vmm`, `zygote_child`)
 2  page map      /proc/self/pagemap opened: saving needs it, and there is no /proc later
 3  message       the shim says what machine, and which uid; its descriptors come along
 4  the host      no core file, bounded descriptors and processes; network, IPC and host name of its
                  own, with nothing in them; the bounding set
 5  root          an empty, read-only tmpfs, and no other mount
 6  limits        file size and memory, by the machine's
 7  identity      groups, gid, uid: with the uid all capabilities go
 8  secrecy       not dumpable: no ptrace, no core, /proc/PID is root's
 9  no new rights no_new_privs, which the filter needs too
10  machine       made from the descriptors that came, without any right; /dev/kvm is closed
11  threads       one per vCPU, held before the guest's first instruction
12  system calls  the filter of `vmcell_runtime.system_calls`, for all threads at once
13  the guest runs

`enter` is 4 to 9, `seal` is 12. From 5 on nothing can be opened by name, so nothing may be imported
for the first time either. A forbidden system call ends the process by SIGSYS; before that the
Python stack of its thread is written to the log (faulthandler: no lock, no allocation; other
threads' stacks change while they are read).

A VMM that was not started by root, which only tests do, cannot do 5 and 7, and of 4 has the limits
but that of processes; it says so in its log, once. Sources: unshare(2), pivot_root(2),
capabilities(7), prctl(2), seccomp(2), getrlimit(2), Linux
Documentation/userspace-api/no_new_privs.rst.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal

# Printing a traceback is the last thing a VMM does; newer Pythons import this for it.
import traceback  # noqa: F401
from contextlib import suppress
from typing import NamedTuple

from vmcell_protos.errors import HostError
from vmcell_runtime.system_calls import vmm_filter

CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH = 2
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_PIVOT_ROOT, _SYS_SECCOMP = 155, 317
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1

# A machine's own, at most: all devices and spare windows, and 256 streams of its guest.
MAX_DESCRIPTORS = 1024
# One per vCPU, the loop, vhost's and KVM's own, which Linux counts as the process's.
MAX_THREADS = 64
# The interpreter, stacks, buffers of all devices; guest RAM comes on top.
OWN_MEMORY_BYTES = 128 << 20
# Beside RAM and disks: the log, the console and a machine's state.
OTHER_FILES_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (*(ctypes.c_char_p,) * 3, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    """struct sock_fprog of <linux/filter.h>."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class EmptyRoot(NamedTuple):
    """A mount namespace with nothing but an empty read-only tmpfs, and that tmpfs's directory.

    Made once, it serves many processes: none of them can change it. Owned by who made it.
    """

    namespace_fd: int
    directory_fd: int


class Bounds(NamedTuple):
    """`ram_bytes` of the guest; `file_bytes`: the longest disk that the VMM writes to, None where
    disks may come that nobody knows of yet."""

    ram_bytes: int
    file_bytes: int | None


def leave_host() -> None:
    """Step 4, which a spare VMM does ahead. Only limits where the process is not root's.
    HostError."""
    _set_own_limits()
    if os.geteuid() != 0:
        return
    _call("leave the host's namespaces", "unshare", CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    capability = 0
    while not _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
        capability += 1  # up to the kernel's last one


def enter(
    uid: int, bounds: Bounds, empty_root: EmptyRoot | None, *, has_left: bool = False
) -> bool:
    """Steps 4 to 9, as the first thread and the only one; False if not all could be done because
    the process is not root's. HostError when a step fails.

    `uid`, which is also the gid, is nobody else's while this process lives. `has_left`: it has done
    step 4 already.
    """
    whole = os.geteuid() == 0
    if whole and uid <= 0:
        raise ValueError(f"a VMM of root's was given uid {uid}")
    if not has_left:
        leave_host()
    if whole:
        if empty_root is not None:
            _enter_root(empty_root)
        else:
            _make_root()
    _set_machine_limits(bounds)
    if whole:
        _become(uid)
    _call("become undumpable", "prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call("give up new rights", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return whole


def seal() -> None:
    """Step 12, with every thread started and none in the guest. HostError when it fails."""
    # Written by C code in the signal's handler, then the default: the process ends by SIGSYS.
    faulthandler.register(signal.SIGSYS, file=2, all_threads=False, chain=True)
    program = vmm_filter(os.getpid())
    filter_ = ctypes.byref(_Program(len(program) // 8, program))
    flags = _SECCOMP_FILTER_FLAG_TSYNC
    failed = _libc.syscall(_SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, filter_)
    if failed > 0:
        raise HostError(f"the VMM's thread {failed} cannot have its system call filter")
    if failed:
        raise _error("filter the VMM's system calls")


def make_empty_root() -> EmptyRoot:
    """For a process that starts many: costs a fork of it, which must have one thread. HostError."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        _be_root_maker(theirs)
    try:
        os.close(theirs)
        reason = os.read(ours, 4096)
        if reason != b"made":
            raise HostError(reason.decode(errors="replace") or "nobody made an empty root")
        flags = os.O_RDONLY | os.O_CLOEXEC
        namespace_fd = os.open(f"/proc/{pid}/ns/mnt", flags)
        try:
            directory = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            return EmptyRoot(namespace_fd, os.open(f"/proc/{pid}/root", directory))
        except BaseException:
            os.close(namespace_fd)
            raise
    except OSError as error:
        raise HostError(f"cannot reach an empty root: {error.strerror}") from error
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        # A renewed zygote ignores SIGCHLD, and the kernel reaps.
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _be_root_maker(told: int) -> None:
    """In a child: makes the root, says so, and waits to be killed."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        _make_root()
        os.write(told, b"made")
        signal.pause()
    except BaseException as error:  # noqa: BLE001  there must be no second zygote
        os.write(told, str(error).encode(errors="replace")[:4096])
    os._exit(1)


def _make_root() -> None:
    """A mount namespace of this process's own, with an empty read-only root in it."""
    doing = "have an empty root"
    _call(doing, "unshare", CLONE_NEWNS)
    _call(doing, "mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    # /proc is there on any host, and covering it is seen by nobody else.
    _call(doing, "mount", b"vmcell", b"/proc", b"tmpfs", flags, b"size=4k,nr_inodes=2,mode=555")
    try:
        os.chdir("/proc")
    except OSError as error:
        raise HostError(f"the VMM cannot {doing}: {error.strerror}") from error
    # The old root comes to stand upon the new one, and goes (pivot_root(2), NOTES).
    _call(doing, "syscall", _SYS_PIVOT_ROOT, b".", b".")
    _call(doing, "umount2", b".", _MNT_DETACH)
    os.chdir("/")


def _enter_root(root: EmptyRoot) -> None:
    _call("have an empty root", "setns", root.namespace_fd, CLONE_NEWNS)
    try:
        # The namespace's own root is not this one where its maker lived in a chroot.
        os.fchdir(root.directory_fd)
        os.chroot(".")
    except OSError as error:
        raise HostError(f"the VMM cannot enter its empty root: {error.strerror}") from error
    os.close(root.namespace_fd)
    os.close(root.directory_fd)


def _set_own_limits() -> None:
    """Those that are the same for every machine."""
    _set_limits({resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: MAX_DESCRIPTORS})
    if os.geteuid() == 0:
        # Counted per uid, so of no use where others have it too.
        _set_limits({resource.RLIMIT_NPROC: MAX_THREADS})


def _set_machine_limits(bounds: Bounds) -> None:
    # RAM twice: Linux counts an image that is laid over RAM before what it takes the place of, and
    # saving takes some bytes for each page.
    limits = {resource.RLIMIT_DATA: 2 * bounds.ram_bytes + OWN_MEMORY_BYTES}
    if bounds.file_bytes is not None:
        longest = max(bounds.ram_bytes, bounds.file_bytes)
        limits[resource.RLIMIT_FSIZE] = longest + OTHER_FILES_BYTES
    _set_limits(limits)


def _set_limits(limits: dict[int, int]) -> None:
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))


def _become(uid: int) -> None:
    """No group, no capability in any set, and this uid for good."""
    try:
        os.setgroups(())
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise HostError(
            f"the VMM cannot become uid {uid}: {error.strerror}; is it one of this host's? "
            "`vmcell doctor` looks at the range"
        ) from error
    _call("drop its ambient rights", "prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _call("drop its rights", "capset", header, nothing)


def _call(doing: str, name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        raise _error(doing)


def _error(doing: str) -> HostError:
    return HostError(f"the VMM cannot {doing}: {os.strerror(ctypes.get_errno())}")
