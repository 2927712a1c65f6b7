"""What a VMM may ask of the kernel: by the filter's own program, without a kernel."""

from __future__ import annotations

import errno
import re
import signal
import subprocess

import bpf
import pytest

from vmcell_runtime import system_calls
from vmcell_runtime.kvm import abi
from vmcell_runtime.seccomp import ALLOW, KILL_PROCESS, TRAP, errno_action
from vmcell_runtime.system_calls import BY_NAME, FREE, HOST_REQUESTS, KVM_REQUESTS, vmm_filter
from vmcell_runtime.virtio import host_abi

PID = 4711
PROGRAM = vmm_filter(PID)
EPERM = errno_action(errno.EPERM)
# What is looked at more closely below
BY_ARGUMENT = {"ioctl", "mmap", "mprotect", "fcntl", "newfstatat", "tgkill", "rt_sigaction"}


@pytest.fixture(scope="module")
def numbers() -> dict[str, int]:
    """Every system call of this machine's headers."""
    text = subprocess.run(
        ["cc", "-E", "-dM", "-include", "asm/unistd_64.h", "-xc", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    found = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+) (\d+)\n", text)}
    assert len(found) > 300
    return found


def action(number: int, *arguments: int) -> int:
    return bpf.run(PROGRAM, bpf.call(number, *arguments)).action


def test_the_numbers_are_the_kernels(numbers: dict[str, int]) -> None:
    for number, name in (*FREE, *BY_NAME):
        assert numbers[name] == number, name
    for name in BY_ARGUMENT:
        assert numbers[name] == getattr(system_calls, f"_{name.upper()}"), name


def test_everything_not_listed_ends_the_vmm(numbers: dict[str, int]) -> None:
    free, refused = {name for _, name in FREE}, {name for _, name in BY_NAME}
    for name, number in numbers.items():
        if name in BY_ARGUMENT - {"newfstatat"}:
            continue
        expected = ALLOW if name in free else EPERM if name in refused else TRAP
        assert action(number) == expected, name
    for number in range(max(numbers.values()) + 1, 1000):
        assert action(number) == TRAP
    assert action(0x40000000 | numbers["read"]) == KILL_PROCESS
    assert bpf.run(PROGRAM, bpf.call(3, arch=0x40000003)).action == KILL_PROCESS, "i386"


def test_only_listed_requests_of_ioctl(numbers: dict[str, int]) -> None:
    ioctl = numbers["ioctl"]
    for request in (*KVM_REQUESTS, *HOST_REQUESTS):
        assert action(ioctl, 5, request) == ALLOW
        assert action(ioctl, 5, request | 1 << 32) == ALLOW, "the kernel looks at 32 bits too"
    assert action(ioctl, 5, system_calls.TCGETS) == errno_action(errno.ENOTTY)
    forbidden = {
        *(abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU, abi.KVM_SET_CPUID2, abi.KVM_SET_MSRS),
        *(abi.KVM_SET_SREGS, abi.KVM_IRQFD, abi.KVM_CREATE_IRQCHIP, abi.KVM_SET_TSS_ADDR),
        *(host_abi.TUNSETIFF, host_abi.VHOST_SET_OWNER),
        0x5412,  # TIOCSTI
        0x40049409,  # FICLONE
        0x8933,  # SIOCGIFINDEX
    }
    assert not forbidden & {*KVM_REQUESTS, *HOST_REQUESTS}
    known = {*KVM_REQUESTS, *HOST_REQUESTS, system_calls.TCGETS}
    for request in forbidden | set(abi.REQUEST_NAMES) - known:
        assert action(ioctl, 5, request) == TRAP, hex(request)


@pytest.mark.parametrize("name", ["mmap", "mprotect"])
def test_no_memory_becomes_code(numbers: dict[str, int], name: str) -> None:
    for protection in range(8):
        expected = TRAP if protection & 4 else ALLOW
        assert action(numbers[name], 0x7000_0000, 4096, protection) == expected
    assert action(numbers[name], 0, 4096, 1 << 32 | 4) == TRAP
    assert action(numbers["pkey_mprotect"], 0, 4096, 1) == TRAP


def test_signals_for_itself_only(numbers: dict[str, int]) -> None:
    assert action(numbers["tgkill"], PID, PID + 1, signal.SIGRTMIN) == ALLOW
    for other in (0, 1, PID + 1, 2**32 - 1):
        assert action(numbers["tgkill"], other, other, signal.SIGKILL) == TRAP
    for name in ("kill", "tkill", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        assert action(numbers[name], PID, signal.SIGKILL) == TRAP
    assert action(numbers["rt_sigaction"], signal.SIGSYS) == ALLOW
    assert action(numbers["rt_sigaction"], signal.SIGSEGV) == TRAP


def test_the_few_ways_to_touch_a_descriptor(numbers: dict[str, int]) -> None:
    allowed = {1, 2, 3, 4, 1030}  # GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC
    for command in (*range(50), *range(1020, 1045)):
        assert action(numbers["fcntl"], 5, command) == (ALLOW if command in allowed else TRAP)
    assert action(numbers["newfstatat"], 5, 0x1000, 0x2000, 0x1000) == ALLOW, "fstat"
    for flags in (0, 0x100, 0x1100, 0x800):
        assert action(numbers["newfstatat"], 5, 0x1000, 0x2000, flags) == EPERM


def test_what_is_frequent_is_decided_first(numbers: dict[str, int]) -> None:
    """Instructions, of which one costs about a nanosecond when compiled."""
    steps = {
        "KVM_RUN": bpf.run(PROGRAM, bpf.call(numbers["ioctl"], 5, abi.KVM_RUN)).steps,
        "read": bpf.run(PROGRAM, bpf.call(numbers["read"])).steps,
        "epoll_wait": bpf.run(PROGRAM, bpf.call(numbers["epoll_wait"])).steps,
        "preadv2": bpf.run(PROGRAM, bpf.call(numbers["preadv2"])).steps,
    }
    assert steps["KVM_RUN"] <= 10, steps
    assert max(steps.values()) <= 20, steps
