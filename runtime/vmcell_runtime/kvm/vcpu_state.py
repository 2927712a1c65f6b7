"""All of a vCPU that KVM holds, taken out and put back; the order matters and is kept here.

Out (api.rst 4.36 ff.; virt/kvm of Linux 6.1): KVM_GET_MP_STATE first, for it lets pending INITs and
SIPIs take effect; the deadline MSR before the APIC, for a timer that runs out in between is pending
in the APIC and its MSR is 0 (each request may let it: kvm_arch_vcpu_load restarts it), and what is
seen twice does no harm; the events last, for the other requests may still change them. Back: the
APIC's base (in sregs) before the APIC, the APIC and the counter before the deadline MSR, and the
events again last.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.vcpu import Vcpu

REGS_BYTES = ctypes.sizeof(abi.kvm_regs)
SREGS_BYTES = ctypes.sizeof(abi.kvm_sregs)
LENGTHS = {
    "regs": REGS_BYTES,
    "sregs": SREGS_BYTES,
    "xcrs": abi.XCRS_BYTES,
    "debugregs": abi.DEBUGREGS_BYTES,
    "lapic": abi.LAPIC_BYTES,
    "events": abi.EVENTS_BYTES,
}
"""Bytes of each opaque part; of xsave at least 4096."""


class VcpuState(NamedTuple):
    """KVM's structs as bytes; `msrs` by index."""

    mp_state: int
    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes
    debugregs: bytes
    lapic: bytes
    msrs: dict[int, int]
    events: bytes


def save_vcpu(vcpu: Vcpu, msrs: list[int], xsave_bytes: int) -> VcpuState:
    """The state of a vCPU that stands still; `msrs` and `xsave_bytes` are the `System`'s."""
    wide = xsave_bytes > abi.XSAVE_BYTES
    return VcpuState(
        mp_state=vcpu.mp_state(),
        regs=vcpu.get_opaque(abi.KVM_GET_REGS, REGS_BYTES),
        sregs=vcpu.get_opaque(abi.KVM_GET_SREGS, SREGS_BYTES),
        xsave=vcpu.get_opaque(abi.KVM_GET_XSAVE2 if wide else abi.KVM_GET_XSAVE, xsave_bytes),
        xcrs=vcpu.get_opaque(abi.KVM_GET_XCRS, abi.XCRS_BYTES),
        debugregs=vcpu.get_opaque(abi.KVM_GET_DEBUGREGS, abi.DEBUGREGS_BYTES),
        msrs=vcpu.get_msrs(msrs),
        lapic=vcpu.get_opaque(abi.KVM_GET_LAPIC, abi.LAPIC_BYTES),
        events=vcpu.get_opaque(abi.KVM_GET_VCPU_EVENTS, abi.EVENTS_BYTES),
    )


def load_vcpu(vcpu: Vcpu, state: VcpuState, xsave_bytes: int) -> None:
    """Puts `state` into a vCPU that has its CPUID and has never run.

    CallerError if it was saved with a larger extended state than this host has; HostError names
    what KVM refused.
    """
    if len(state.xsave) > xsave_bytes:
        raise CallerError(
            f"the snapshot has {len(state.xsave)} bytes of processor state, this host takes "
            f"{xsave_bytes}; restore it where it was made",
            code="failed_precondition",
        )
    vcpu.set_mp_state(state.mp_state)
    vcpu.set_opaque(abi.KVM_SET_REGS, state.regs)
    vcpu.set_opaque(abi.KVM_SET_SREGS, state.sregs)
    vcpu.set_opaque(abi.KVM_SET_XSAVE, state.xsave.ljust(xsave_bytes, b"\0"))
    vcpu.set_opaque(abi.KVM_SET_XCRS, state.xcrs)
    vcpu.set_opaque(abi.KVM_SET_DEBUGREGS, state.debugregs)
    vcpu.set_opaque(abi.KVM_SET_LAPIC, state.lapic)
    vcpu.set_msrs(dict(sorted(state.msrs.items(), key=_is_deadline)))
    vcpu.set_opaque(abi.KVM_SET_VCPU_EVENTS, state.events)


def _is_deadline(row: tuple[int, int]) -> bool:
    return row[0] == abi.MSR_IA32_TSC_DEADLINE
