"""What somebody who has taken a VMM over might try; for a VMM that a test starts, never shipped.

`arm` has the VMM try one act when its guest is about to run, jailed as any other, on the thread
that is asked for, and write to the log what became of it: the errno, or that it was done.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

from vmcell_runtime import machine as machine_module
from vmcell_runtime import vcpu as vcpu_module

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_page = ctypes.create_string_buffer(8192)
_O_WRITE = os.O_WRONLY | os.O_CREAT
_AT_FDCWD = -100

Act = Callable[[], int]


def _call(number: int, *arguments: object) -> Act:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return lambda: int(_libc.syscall(ctypes.c_long(number), *wide))


def _mmap_exec() -> int:
    return int(_libc.syscall(9, 0, 4096, 5, 0x22, -1, 0))


def _mprotect_exec() -> int:
    start = ctypes.addressof(_page) + 4095 & ~4095
    return int(_libc.syscall(10, ctypes.c_long(start), ctypes.c_long(4096), 7))


_argv = (ctypes.c_char_p * 2)(b"/bin/true", None)
_iov = (ctypes.c_long * 2)(ctypes.addressof(_page), 8)
_bpf = struct.pack("<IIQQ", 1, 2, 0, 0).ljust(128, b"\0")
_uring = b"\0" * 120
_perf = struct.pack("<II", 1, 112).ljust(112, b"\0")

ACTS: dict[str, Act] = {
    "exec": _call(59, b"/bin/true", _argv, None),
    "execveat": _call(322, _AT_FDCWD, b"/bin/true", _argv, None, 0),
    "open-write": _call(257, _AT_FDCWD, b"/tmp/vmcell-escaped", _O_WRITE, 0o600),
    "open-read": _call(257, _AT_FDCWD, b"/etc/passwd", os.O_RDONLY, 0),
    "open-proc": _call(2, b"/proc/self/mem", os.O_RDWR, 0),
    "socket-inet": _call(41, 2, 1, 0),
    "socket-unix": _call(41, 1, 1, 0),
    "socket-netlink": _call(41, 16, 3, 0),
    "ptrace": _call(101, 0, 0, 0, 0),
    "mprotect-exec": _mprotect_exec,
    "mmap-exec": _mmap_exec,
    "fork": _call(56, 17, 0, 0, 0, 0),
    "thread": _call(56, 0x3D0F00, 0, 0, 0, 0),
    "clone3": _call(435, b"\0" * 88, 88),
    "bpf": _call(321, 0, _bpf, 128),
    "mount": _call(165, b"none", b"/", b"tmpfs", 0, None),
    "umount": _call(166, b"/", 2),
    "pivot-root": _call(155, b".", b"."),
    "setns": _call(308, 0, 0),
    "unshare": _call(272, 0x10000000),
    "chroot": _call(161, b"/"),
    # Signal 0 kills nobody where the jail should fail; whether it may is asked all the same.
    "kill": _call(62, 1, 0),
    "tgkill-other": _call(234, 1, 1, 0),
    "ioctl-tiocsti": _call(16, 0, 0x5412, b"x"),
    "ioctl-create-vcpu": _call(16, 0, 0xAE41, 7),
    "ioctl-create-vm": _call(16, 0, 0xAE01, 0),
    "x32": _call(0x40000000 | 39),
    "keyctl": _call(250, 0, -3, 0),
    "add-key": _call(248, b"user", b"x", b"y", 1, -3),
    "perf-event-open": _call(298, _perf, 0, -1, -1, 0),
    "io-uring-setup": _call(425, 4, _uring),
    "userfaultfd": _call(323, 1),
    "process-vm-readv": _call(310, 1, _iov, 1, _iov, 1, 0),
    "process-vm-writev": _call(311, 1, _iov, 1, _iov, 1, 0),
    "pidfd-open": _call(434, 1, 0),
    "reboot": _call(169, 0, 0, 0, None),  # not the magic number: who may gets EINVAL
    "init-module": _call(175, b"x", 1, b""),
    "setuid": _call(105, 0),
    "dumpable": _call(157, 4, 1, 0, 0, 0),
    "personality": _call(135, 0x0400000),
    "seccomp": _call(317, 1, 0, None),
    "prlimit": _call(302, 0, 4, struct.pack("<QQ", 1 << 40, 1 << 40), None),
    "memfd": _call(319, b"x", 0),
    "socketpair": _call(53, 1, 1, 0, (ctypes.c_int * 2)()),
    "connect": _call(42, 0, b"\1\0/run/containerd/containerd.sock\0", 34),
}


def _try(name: str) -> None:
    result = ACTS[name]()
    code = ctypes.get_errno()
    said = f"act {name}: {'refused, errno ' + str(code) if result == -1 else 'DONE'}\n"
    os.write(2, said.encode())


def arm(name: str, thread: str) -> None:
    """`thread` is loop or vcpu. What comes of it is in the log, if the VMM lives to say."""
    if thread == "vcpu":
        inner = vcpu_module.VcpuThread._mmio

        def mmio(self: vcpu_module.VcpuThread) -> None:
            _try(name)
            inner(self)

        vcpu_module.VcpuThread._mmio = mmio  # type: ignore[method-assign]  # a hook of this test's
        return
    run = machine_module.EventLoop.run

    def loop(self: machine_module.EventLoop) -> None:
        _try(name)
        run(self)

    machine_module.EventLoop.run = loop  # type: ignore[method-assign]  # a hook of this test's
