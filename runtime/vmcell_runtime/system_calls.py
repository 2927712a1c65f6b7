"""What a VMM may ask of the kernel once its guest runs; everything else ends it.

The list is what the event loop, the vCPU threads and the devices do, measured by running every test
of theirs under it. Numbers are x86-64's (arch/x86/entry/syscalls/syscall_64.tbl). The order is how
often: an exit of the guest is one ioctl, a request of it a read, a write and a poll.

- ioctl by request, of KVM, vhost and TAPs: all that a running machine uses, none that makes a VM, a
  vCPU or an owner. The kernel takes the request as 32 bits.
- No PROT_EXEC, which is in the low word of `prot`, with mmap and mprotect.
- Signals to this process only, which is what pthread_kill does; a pid has 32 bits. The one handler
  that may change is SIGSYS's: whatever it does, the forbidden call is not made.
- No socket and no connection: it talks to whom it was given, over pairs that take no address.
- What opens or looks at files by name fails with EPERM instead of ending the VMM: printing a
  traceback does it, and goes on without the source's lines.
"""

from __future__ import annotations

import errno
import signal
from fcntl import F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, F_SETFL

from vmcell_runtime.kvm import abi
from vmcell_runtime.seccomp import (
    ALLOW,
    TRAP,
    Rule,
    Word,
    encode_filter,
    encode_rules,
    errno_action,
)
from vmcell_runtime.virtio import host_abi

# asm-generic/ioctls.h: what sockets and descriptors of Python's do
FIONBIO = 0x5421
FIOCLEX = 0x5451
TCGETS = 0x5401
_AT_EMPTY_PATH = 0x1000
_PROT_EXEC = 4
_IOCTL, _MMAP, _MPROTECT, _FCNTL, _NEWFSTATAT, _TGKILL = 16, 9, 10, 72, 262, 234
_RT_SIGACTION = 13

KVM_REQUESTS = (
    # exits, kicks and the clock
    *(abi.KVM_RUN, abi.KVM_GET_REGS, abi.KVM_GET_CLOCK, abi.KVM_SET_CLOCK),
    *(abi.KVM_KVMCLOCK_CTRL, abi.KVM_GET_MSRS, abi.KVM_GET_TSC_KHZ),
    *(abi.KVM_HAS_DEVICE_ATTR, abi.KVM_GET_DEVICE_ATTR, abi.KVM_SET_DEVICE_ATTR),
    # devices that come and go
    *(abi.KVM_SET_USER_MEMORY_REGION, abi.KVM_IOEVENTFD),
    # saving
    *(abi.KVM_GET_MP_STATE, abi.KVM_GET_SREGS, abi.KVM_GET_XSAVE, abi.KVM_GET_XSAVE2),
    *(abi.KVM_GET_XCRS, abi.KVM_GET_DEBUGREGS, abi.KVM_GET_LAPIC, abi.KVM_GET_VCPU_EVENTS),
    abi.KVM_GET_IRQCHIP,
)
HOST_REQUESTS = (
    *(FIOCLEX, FIONBIO, host_abi.TUNSETOFFLOAD),
    *(host_abi.VHOST_SET_FEATURES, host_abi.VHOST_SET_MEM_TABLE, host_abi.VHOST_SET_VRING_NUM),
    *(host_abi.VHOST_SET_VRING_ADDR, host_abi.VHOST_SET_VRING_BASE, host_abi.VHOST_GET_VRING_BASE),
    *(host_abi.VHOST_SET_VRING_KICK, host_abi.VHOST_SET_VRING_CALL, host_abi.VHOST_NET_SET_BACKEND),
)

FREE = (
    *((0, "read"), (1, "write"), (232, "epoll_wait"), (202, "futex")),
    *((19, "readv"), (20, "writev"), (295, "preadv"), (296, "pwritev")),
    *((327, "preadv2"), (328, "pwritev2"), (45, "recvfrom"), (44, "sendto")),
    *((47, "recvmsg"), (46, "sendmsg"), (228, "clock_gettime"), (96, "gettimeofday")),
    *((233, "epoll_ctl"), (281, "epoll_pwait"), (7, "poll"), (15, "rt_sigreturn")),
    *((14, "rt_sigprocmask"), (219, "restart_syscall"), (39, "getpid"), (186, "gettid")),
    *((24, "sched_yield"), (11, "munmap"), (28, "madvise"), (12, "brk"), (25, "mremap")),
    *((3, "close"), (5, "fstat"), (8, "lseek"), (290, "eventfd2"), (17, "pread64")),
    *((18, "pwrite64"), (75, "fdatasync"), (285, "fallocate"), (318, "getrandom")),
    *((48, "shutdown"), (51, "getsockname"), (55, "getsockopt"), (60, "exit")),
    (231, "exit_group"),
)
"""Allowed whatever the arguments: they reach no further than a descriptor or memory of the VMM."""

BY_NAME = (
    *((2, "open"), (257, "openat"), (437, "openat2"), (4, "stat"), (6, "lstat"), (332, "statx")),
    *((262, "newfstatat"), (21, "access"), (269, "faccessat"), (439, "faccessat2")),
    *((89, "readlink"), (267, "readlinkat"), (79, "getcwd")),
)
"""Refused with EPERM."""

_RULES = (
    Rule(_IOCTL, ALLOW, (Word(1, KVM_REQUESTS),)),
    *(Rule(number) for number, _ in FREE),
    Rule(_IOCTL, ALLOW, (Word(1, HOST_REQUESTS),)),
    # A terminal? asks whoever writes a traceback; nothing here is one.
    Rule(_IOCTL, errno_action(errno.ENOTTY), (Word(1, (TCGETS,)),)),
    Rule(_MMAP, ALLOW, (Word(2, (0,), _PROT_EXEC),)),
    Rule(_MPROTECT, ALLOW, (Word(2, (0,), _PROT_EXEC),)),
    Rule(_FCNTL, ALLOW, (Word(1, (F_GETFL, F_SETFL, F_GETFD, F_SETFD, F_DUPFD_CLOEXEC)),)),
    # fstat of newer C libraries: a descriptor, and as its name an empty string
    Rule(_NEWFSTATAT, ALLOW, (Word(3, (_AT_EMPTY_PATH,)),)),
    *(Rule(number, errno_action(errno.EPERM)) for number, _ in BY_NAME),
    # faulthandler, once it has told of a forbidden call, has the default of this signal back
    Rule(_RT_SIGACTION, ALLOW, (Word(0, (signal.SIGSYS,)),)),
)
_ENCODED = encode_rules(_RULES)


def vmm_filter(pid: int) -> bytes:
    """The program for the VMM whose process is `pid`."""
    own_threads = encode_rules((Rule(_TGKILL, ALLOW, (Word(0, (pid,)),)),))
    return encode_filter((_ENCODED, own_threads), TRAP)
