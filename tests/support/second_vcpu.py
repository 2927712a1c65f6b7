"""Lets the second vCPU of a payload run from the start; loaded by the VMM process of a test.

A Linux starts it by INIT and SIPI, which kvm_pvm's vCPUs do not hear.
"""

from __future__ import annotations

from vmcell_runtime import build
from vmcell_runtime.boot.entry import entry_fpu, entry_regs, entry_sregs
from vmcell_runtime.build import Descriptors
from vmcell_runtime.clock import Time
from vmcell_runtime.config import MachineConfig
from vmcell_runtime.frame import Frame

KVM_MP_STATE_RUNNABLE = 0


def install(entry_gpa: int) -> None:
    """From now on each machine's vCPUs but the first begin at `entry_gpa`, in long mode."""
    load_kernel = build._load_kernel

    def load_and_start(config: MachineConfig, descriptors: Descriptors, frame: Frame) -> Time:
        time = load_kernel(config, descriptors, frame)
        for vcpu in frame.vcpus[1:]:
            vcpu.set_sregs(entry_sregs(vcpu.get_sregs()))
            vcpu.set_regs(entry_regs(entry_gpa))
            vcpu.set_fpu(entry_fpu())
            vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
        return time

    build._load_kernel = load_and_start
