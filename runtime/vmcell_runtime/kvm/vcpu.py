"""One vCPU: its registers and its run page; KVM_RUN and what a guest's exit says.

Facts about KVM_RUN that matter here (api.rst 4.10 and 5):
- `fcntl.ioctl` with a number as argument releases the GIL while the guest runs, and does not retry
  on EINTR. EINTR is how a kick arrives: `immediate_exit` was set or a signal came.
- EAGAIN is how a vCPU waiting for its SIPI says that it has become runnable: run again.
- After an exit for I/O or MMIO the instruction completes at the next KVM_RUN, also when that one
  returns at once because of `immediate_exit`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from fcntl import ioctl
from typing import NamedTuple

from vmcell_protos.errors import HostError
from vmcell_runtime.kvm.abi import (
    KVM_GET_DEVICE_ATTR,
    KVM_GET_MP_STATE,
    KVM_GET_MSRS,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_TSC_KHZ,
    KVM_HAS_DEVICE_ATTR,
    KVM_KVMCLOCK_CTRL,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_DEVICE_ATTR,
    KVM_SET_FPU,
    KVM_SET_MP_STATE,
    KVM_SET_MSRS,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_TSC_KHZ,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    MSR_IA32_TSC,
    kvm_device_attr,
    kvm_fpu,
    kvm_mp_state,
    kvm_regs,
    kvm_run,
    kvm_run_mmio,
    kvm_run_system_event,
    kvm_sregs,
)
from vmcell_runtime.kvm.cpuid import CpuidEntry, encode_cpuid
from vmcell_runtime.kvm.ioctl import kvm_ioctl
from vmcell_runtime.kvm.layouts import offset_of
from vmcell_runtime.memory import RunPage

_IMMEDIATE_EXIT = offset_of(kvm_run, "immediate_exit")
_EXIT_REASON_WORD = offset_of(kvm_run, "exit_reason") // 4
_EXIT = offset_of(kvm_run, "exit")
_IO = struct.Struct("=BBHIQ")
_MMIO = struct.Struct("=Q8sIB")
_MMIO_DATA = _EXIT + offset_of(kvm_run_mmio, "data")
_INTERNAL = struct.Struct("=II16Q")
_SYSTEM_EVENT_WORD = (_EXIT + offset_of(kvm_run_system_event, "type")) // 4


class IoExit(NamedTuple):
    """A port access: `repeat` items of `size` bytes at `data_offset` of the run page."""

    direction: int
    size: int
    port: int
    repeat: int
    data_offset: int


class MmioExit(NamedTuple):
    """A memory access that met no slot, or a write to a read-only one."""

    gpa: int
    data: bytes
    length: int
    is_write: int


class Vcpu:
    """Owns a vCPU descriptor and its run page; `close` is idempotent.

    Registers and `run` belong to one thread at a time; `set_immediate_exit` is for any.
    """

    def __init__(self, fd: int, run_page_bytes: int) -> None:
        self._fd = fd
        self._page = RunPage(fd, run_page_bytes)
        self._bytes = self._page.bytes
        self._words = self._page.words

    def run(self) -> int:
        """Enters the guest; the exit reason. InterruptedError and BlockingIOError as they come."""
        ioctl(self._fd, KVM_RUN, 0)
        reason: int = self._words[_EXIT_REASON_WORD]
        return reason

    def set_immediate_exit(self, wanted: bool) -> None:
        """While set, `run` raises InterruptedError before the guest runs."""
        self._bytes[_IMMEDIATE_EXIT] = wanted

    def io_exit(self) -> IoExit:
        return IoExit._make(_IO.unpack_from(self._bytes, _EXIT))

    def io_read(self, offset: int, length: int) -> bytes:
        """What the guest wrote: `length` bytes of the run page, all of them or ValueError."""
        return bytes(self._io_view(offset, length))

    def io_write(self, offset: int, data: bytes) -> None:
        """What the guest shall read, into the run page."""
        self._io_view(offset, len(data))[:] = data

    def mmio_exit(self) -> MmioExit:
        return MmioExit._make(_MMIO.unpack_from(self._bytes, _EXIT))

    def mmio_answer(self, data: bytes) -> None:
        """The bytes the guest's load returns, at most 8."""
        self._bytes[_MMIO_DATA : _MMIO_DATA + len(data)] = data

    def internal_error(self) -> tuple[int, tuple[int, ...]]:
        """(suberror, data words) of KVM_EXIT_INTERNAL_ERROR."""
        suberror, count, *data = _INTERNAL.unpack_from(self._bytes, _EXIT)
        return suberror, tuple(data[: min(count, len(data))])

    def fail_entry_reason(self) -> int:
        """The hardware's code of KVM_EXIT_FAIL_ENTRY."""
        return int.from_bytes(self._bytes[_EXIT : _EXIT + 8], "little")

    def system_event_type(self) -> int:
        """One of KVM_SYSTEM_EVENT_*."""
        event: int = self._words[_SYSTEM_EVENT_WORD]
        return event

    def get_regs(self) -> kvm_regs:
        regs = kvm_regs()
        kvm_ioctl(self._fd, KVM_GET_REGS, regs)
        return regs

    def set_regs(self, regs: kvm_regs) -> None:
        kvm_ioctl(self._fd, KVM_SET_REGS, regs)

    def get_sregs(self) -> kvm_sregs:
        sregs = kvm_sregs()
        kvm_ioctl(self._fd, KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: kvm_sregs) -> None:
        kvm_ioctl(self._fd, KVM_SET_SREGS, sregs)

    def set_fpu(self, fpu: kvm_fpu) -> None:
        kvm_ioctl(self._fd, KVM_SET_FPU, fpu)

    def set_cpuid(self, entries: list[CpuidEntry]) -> None:
        """Before the first `run`. api.rst 4.46."""
        kvm_ioctl(self._fd, KVM_SET_CPUID2, encode_cpuid(entries))

    def set_msrs(self, msrs: dict[int, int]) -> None:
        """HostError names the first MSR that KVM refused. api.rst 4.19.

        One it refuses to set to 0 is left out: a Linux of another version says so of what a vCPU
        does not have, while Linux 6.12 and later tell and take 0 for it.
        """
        rows = list(msrs.items())
        while rows:
            packed = [struct.pack("<IIQ", index, 0, value) for index, value in rows]
            buffer = bytearray(struct.pack("<II", len(rows), 0) + b"".join(packed))
            done = kvm_ioctl(self._fd, KVM_SET_MSRS, buffer)
            if done < len(rows) and rows[done][1]:
                index, value = rows[done]
                raise HostError(f"KVM refused to set MSR {index:#x} to {value:#x}")
            rows = rows[done + 1 :]

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        """The values of those that the vCPU has. api.rst 4.18.

        KVM's list is of what it can save for some vCPU: before Linux 6.12 it does not tell VMX's of
        one whose CPUID has no VMX.
        """
        found: dict[int, int] = {}
        rest = indices
        while rest:
            packed = b"".join(struct.pack("<IIQ", index, 0, 0) for index in rest)
            buffer = bytearray(struct.pack("<II", len(rest), 0) + packed)
            done = kvm_ioctl(self._fd, KVM_GET_MSRS, buffer)
            rows = list(struct.iter_unpack("<IIQ", buffer[8:]))
            found |= {index: value for index, _, value in rows[:done]}
            rest = rest[done + 1 :]
        return found

    def get_opaque(self, request: int, length_bytes: int) -> bytes:
        """A struct nobody here looks into, as `vcpu_state` saves it."""
        buffer = bytearray(length_bytes)
        kvm_ioctl(self._fd, request, buffer)
        return bytes(buffer)

    def set_opaque(self, request: int, content: bytes) -> None:
        """The opposite of `get_opaque`, with its bytes."""
        kvm_ioctl(self._fd, request, bytearray(content))

    def tsc_khz(self) -> int:
        """Ticks of the guest's time stamp counter in a millisecond. api.rst 4.56."""
        return kvm_ioctl(self._fd, KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Scales the counter, where KVM_CAP_TSC_CONTROL is offered. api.rst 4.55."""
        kvm_ioctl(self._fd, KVM_SET_TSC_KHZ, khz)

    def mp_state(self) -> int:
        """One of KVM_MP_STATE_*: all vCPUs but the first wait for a SIPI at start."""
        state = kvm_mp_state()
        kvm_ioctl(self._fd, KVM_GET_MP_STATE, state)
        return state.mp_state

    def set_mp_state(self, state: int) -> None:
        kvm_ioctl(self._fd, KVM_SET_MP_STATE, kvm_mp_state(mp_state=state))

    def tsc(self) -> int:
        """The guest's time stamp counter now. KVM_GET_MSRS, api.rst 4.18."""
        buffer = bytearray(struct.pack("<IIIIQ", 1, 0, MSR_IA32_TSC, 0, 0))
        if kvm_ioctl(self._fd, KVM_GET_MSRS, buffer) != 1:
            raise HostError("KVM does not tell a guest's time stamp counter")
        return int.from_bytes(buffer[-8:], "little")

    def has_tsc_offset(self) -> bool:
        """If this KVM lets us move the counter: Linux 5.16 and later do."""
        try:
            kvm_ioctl(self._fd, KVM_HAS_DEVICE_ATTR, _tsc_offset_attribute(0))
        except HostError as error:
            if _errno(error) in (errno.ENXIO, errno.EINVAL, errno.ENOTTY):
                return False
            raise
        return True

    def move_tsc(self, ticks: int) -> None:
        """Adds `ticks` to the counter, exactly. KVM vcpu.rst, KVM_VCPU_TSC_OFFSET."""
        offset = ctypes.c_uint64()
        attribute = _tsc_offset_attribute(ctypes.addressof(offset))
        kvm_ioctl(self._fd, KVM_GET_DEVICE_ATTR, attribute)
        offset.value += ticks  # modulo 2**64, as the counter itself
        kvm_ioctl(self._fd, KVM_SET_DEVICE_ATTR, attribute)

    def tell_paused(self) -> bool:
        """Tells the guest's watchdogs that it stood still; False if it has no kvmclock (yet)."""
        try:
            kvm_ioctl(self._fd, KVM_KVMCLOCK_CTRL)
        except HostError as error:
            if _errno(error) == errno.EINVAL:
                return False
            raise
        return True

    def close(self) -> None:
        if self._fd >= 0:
            self._page.close()
            os.close(self._fd)
            self._fd = -1

    def _io_view(self, offset: int, length: int) -> memoryview:
        if offset < _EXIT or length < 0 or offset + length > len(self._bytes):
            raise ValueError(f"I/O data at {offset} of {length} bytes is outside the run page")
        return self._bytes[offset : offset + length]


def _tsc_offset_attribute(value_address: int) -> kvm_device_attr:
    return kvm_device_attr(group=KVM_VCPU_TSC_CTRL, attr=KVM_VCPU_TSC_OFFSET, addr=value_address)


def _errno(error: HostError) -> int | None:
    cause = error.__cause__
    return cause.errno if isinstance(cause, OSError) else None
