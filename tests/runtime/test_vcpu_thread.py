"""What each KVM exit means to a vCPU thread, with scripted exits in the place of a guest."""

from __future__ import annotations

import errno
import re
import struct
from typing import cast

import pytest

from vmcell_runtime.bus import Bus
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.abi import kvm_regs
from vmcell_runtime.kvm.vcpu import IoExit, MmioExit, Vcpu
from vmcell_runtime.vcpu import VcpuThread

PAGE_OFFSET = 4096
STOP = (abi.KVM_EXIT_SHUTDOWN, None)


class ScriptedVcpu:
    """Plays a list of (exit reason or error, its data); `page` is the I/O part of the run page."""

    def __init__(self, *steps: tuple[int | OSError, object]) -> None:
        self._steps = [*steps, STOP]
        self._data: object = None
        self.page = bytearray(8192)
        self.answers: list[bytes] = []

    def run(self) -> int:
        reason, self._data = self._steps.pop(0)
        if isinstance(reason, OSError):
            raise reason
        return reason

    def set_immediate_exit(self, wanted: bool) -> None:
        assert wanted, "a script is never paused"

    def io_exit(self) -> IoExit:
        return cast(IoExit, self._data)

    def mmio_exit(self) -> MmioExit:
        return cast(MmioExit, self._data)

    def io_read(self, offset: int, length: int) -> bytes:
        return bytes(self.page[offset : offset + length])

    def io_write(self, offset: int, data: bytes) -> None:
        self.page[offset : offset + len(data)] = data

    def mmio_answer(self, data: bytes) -> None:
        self.answers.append(data)

    def internal_error(self) -> object:
        return self._data

    def fail_entry_reason(self) -> object:
        return self._data

    def system_event_type(self) -> object:
        return self._data

    def get_regs(self) -> kvm_regs:
        return kvm_regs(rip=0x1234)


class Cells:
    """A device of 16 byte cells that notes its accesses."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return 0x8877665544332211 & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


def play(
    vcpu: ScriptedVcpu, cells: Cells | None = None
) -> tuple[VcpuThread, list[tuple[str, str]]]:
    """Runs the script to its end; the thread and what it said about the machine's end."""
    said: list[tuple[str, str]] = []
    ports, windows = Bus(), Bus()
    for bus in (ports, windows):
        bus.add(0x100, 16, cells or Cells())
    thread = VcpuThread(
        0,
        cast(Vcpu, vcpu),
        ports=ports,
        windows=windows,
        end_machine=lambda reason, detail: said.append((reason, detail)),
    )
    thread.start()
    assert thread.join(10)
    return thread, said


INTERNAL = abi.KVM_EXIT_INTERNAL_ERROR


@pytest.mark.parametrize(
    ("step", "reason", "detail"),
    [
        ((abi.KVM_EXIT_SHUTDOWN, None), "triple_fault", "double fault"),
        ((INTERNAL, (1, (7, 8))), "guest_fault", r"emulate an instruction at 0x1234 .*1: 0x7 0x8"),
        ((INTERNAL, (3, ())), "guest_fault", r"could not go on at 0x1234 \(suberror 3"),
        ((INTERNAL, (4, ())), "vmm_error", r"could not go on at 0x1234 \(suberror 4"),
        ((abi.KVM_EXIT_FAIL_ENTRY, 0x80000021), "vmm_error", "code 0x80000021"),
        ((abi.KVM_EXIT_SYSTEM_EVENT, 1), "guest_shutdown", "shut down"),
        ((abi.KVM_EXIT_SYSTEM_EVENT, 2), "guest_reset", "reset"),
        ((abi.KVM_EXIT_SYSTEM_EVENT, 3), "guest_panic", "crashed"),
        ((abi.KVM_EXIT_SYSTEM_EVENT, 9), "vmm_error", "system event 9"),
        ((abi.KVM_EXIT_HLT, None), "vmm_error", "exit 5, which nothing here can answer"),
        ((99, None), "vmm_error", "exit 99"),
        ((OSError(errno.EFAULT, "Bad address"), None), "vmm_error", "cut short"),
        ((OSError(errno.EIO, "I/O error"), None), "vmm_error", "KVM_RUN failed: I/O error"),
    ],
)
def test_an_exit_a_guest_cannot_go_on_from(
    step: tuple[int | OSError, object], reason: str, detail: str
) -> None:
    _, said = play(ScriptedVcpu(step))
    assert [row[0] for row in said] == [reason], "said once, and the thread ended"
    assert re.search(detail, said[0][1]), said


def test_interruptions_are_no_ends() -> None:
    steps = [
        (OSError(errno.EINTR, ""), None),
        (OSError(errno.EAGAIN, ""), None),
        (abi.KVM_EXIT_INTR, None),
    ]
    thread, said = play(ScriptedVcpu(*steps))
    assert said[0][0] == "triple_fault", "the script was played to its end"
    assert thread.exits == {abi.KVM_EXIT_INTR: 1, abi.KVM_EXIT_SHUTDOWN: 1}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_memory_accesses_are_little_endian(size: int) -> None:
    data = struct.pack("<Q", 0x0123456789ABCDEF)
    value = 0x0123456789ABCDEF & ((1 << 8 * size) - 1)
    cells = Cells()
    vcpu = ScriptedVcpu(
        (abi.KVM_EXIT_MMIO, MmioExit(0x108, data, size, 1)),
        (abi.KVM_EXIT_MMIO, MmioExit(0x100, bytes(8), size, 0)),
    )
    play(vcpu, cells)
    assert cells.seen == [(8, size, value), (0, size)]
    assert vcpu.answers == [struct.pack("<Q", 0x8877665544332211)[:size]]


def test_string_io_is_as_many_accesses() -> None:
    cells = Cells()
    vcpu = ScriptedVcpu(
        (abi.KVM_EXIT_IO, IoExit(abi.KVM_EXIT_IO_OUT, 2, 0x104, 3, PAGE_OFFSET)),
        (abi.KVM_EXIT_IO, IoExit(abi.KVM_EXIT_IO_IN, 1, 0x101, 2, PAGE_OFFSET)),
    )
    vcpu.page[PAGE_OFFSET : PAGE_OFFSET + 6] = b"\x01\x02\x03\x04\x05\x06"
    play(vcpu, cells)
    assert cells.seen == [(4, 2, 0x0201), (4, 2, 0x0403), (4, 2, 0x0605), (1, 1), (1, 1)]
    assert vcpu.page[PAGE_OFFSET : PAGE_OFFSET + 3] == b"\x11\x11\x03"
