"""A saved state goes into a machine that has never run, or is refused with the reason.

The order: what the host must have, then the interrupt controllers, the vCPUs, and the devices last,
since they may raise interrupts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime.clock import Time
from vmcell_runtime.config import MachineConfig
from vmcell_runtime.frame import Frame, Processor
from vmcell_runtime.kvm.abi import KVM_CAP_TSC_CONTROL
from vmcell_runtime.kvm.cpuid_difference import missing_features
from vmcell_runtime.kvm.system import System
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vcpu_state import load_vcpu
from vmcell_runtime.snapshot.fields import damaged
from vmcell_runtime.snapshot.state import MachineState
from vmcell_runtime.virtio.mmio import MmioTransport

# As much as NTP corrects at most (adjtimex(2)); a guest's clock source bears it.
TSC_TOLERANCE_PPM = 500
_NAMED_FEATURES = 8


class Saved(NamedTuple):
    """A state, and a file with the memory that belongs to it; the descriptor stays its owner's."""

    state: MachineState
    memory_fd: int


def check_host(state: MachineState, config: MachineConfig, here: Processor) -> None:
    """CallerError with the list of differences unless this host and `config` can go on with it."""
    if (state.ram_bytes, len(state.vcpus)) != (config.memory_mib << 20, config.vcpu_count):
        raise damaged(
            f"it is of a guest with {state.ram_bytes >> 20} MiB and {len(state.vcpus)} vCPUs, "
            f"but was said to have {config.memory_mib} MiB and {config.vcpu_count}"
        )
    missing = missing_features(state.cpuid, here.cpuid) if state.cpuid != here.cpuid else []
    if state.tsc_deadline and not here.tsc_deadline:
        missing.append("the APIC's deadline timer")
    if missing:
        named = ", ".join(missing[:_NAMED_FEATURES])
        more = f" and {len(missing) - _NAMED_FEATURES} more" if missing[_NAMED_FEATURES:] else ""
        raise CallerError(
            f"the snapshot's guest uses what this processor lacks: {named}{more}; restore it on a "
            "host like the one it was made on",
            code="failed_precondition",
        )


def load_machine(state: MachineState, frame: Frame, transports: Sequence[MmioTransport]) -> Time:
    """Puts everything in its place; the guest's time as it stood. CallerError, HostError."""
    if len(state.transports) != len(transports):
        raise CallerError(
            f"the snapshot has {len(state.transports)} devices, this machine {len(transports)}; "
            "give it the same disks, images and interfaces",
            code="failed_precondition",
        )
    frame.vm.load_irqchips(state.irqchips)
    for vcpu, vcpu_state in zip(frame.vcpus, state.vcpus, strict=True):
        _match_tsc(vcpu, state.tsc_khz, frame.system)
        load_vcpu(vcpu, vcpu_state, frame.processor.xsave_bytes)
    for transport, transport_state in zip(transports, state.transports, strict=True):
        transport.load(transport_state)
    return Time(state.kvmclock_ns, state.tsc)


def _match_tsc(vcpu: Vcpu, khz: int, system: System) -> None:
    here_khz = vcpu.tsc_khz()
    if abs(here_khz - khz) * 1_000_000 <= TSC_TOLERANCE_PPM * khz:
        return
    if not system.check_extension(KVM_CAP_TSC_CONTROL):
        raise CallerError(
            f"the snapshot's time stamp counter runs at {khz} kHz, this host's at {here_khz}, and "
            "its processor cannot scale it; restore it on a host like the one it was made on",
            code="failed_precondition",
        )
    vcpu.set_tsc_khz(khz)
