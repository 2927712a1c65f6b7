"""A VM before it has devices or a guest: memory slots, interrupt lines, vCPUs, an event loop.

It depends on the machine's size and on nothing else of it, so it can be made before anybody asks:
most of a restore's time is the kernel's here (each memory slot waits for a grace period of RCU).
Nothing of one sandbox is in it. RAM is anonymous until an image is laid there, and images' windows
read as zero until they have their files.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime import layout
from vmcell_runtime.boot.entry import ENTRY_MSRS
from vmcell_runtime.irq import IrqLine
from vmcell_runtime.kvm.cpuid import (
    CpuidEntry,
    guest_cpuid,
    physical_address_bits,
    without_cpu_number,
)
from vmcell_runtime.kvm.system import System
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.memory import GuestMemory, Slot
from vmcell_runtime.size import Size


class Processor(NamedTuple):
    """What the guest was shown of the host's processor, and how its state is read."""

    cpuid: tuple[CpuidEntry, ...]
    tsc_deadline: bool
    msrs: list[int]
    xsave_bytes: int


class Frame:
    """Owns all it has; `close` is idempotent. No vCPU has run.

    `processor` is this host's, as every vCPU was shown it. `images` are the slots of the pmem
    windows, in order.
    """

    def __init__(self, size: Size, kvm_fd: int, page_map_fd: int = -1) -> None:
        """Owns `kvm_fd`, also when it raises; `page_map_fd`, as of `GuestMemory`, stays the
        caller's. CallerError, HostError."""
        self.size = size
        self.page_map_fd = page_map_fd
        self.vcpus: list[Vcpu] = []
        self.irqs: dict[int, IrqLine] = {}
        with ExitStack() as resources:
            resources.callback(self._open_system(kvm_fd).close)
            self.processor = Processor(
                tuple(without_cpu_number(self.system.supported_cpuid())),
                self.system.tsc_deadline,
                self.system.saved_msrs(),
                self.system.xsave_bytes(),
            )
            self.address_bits = physical_address_bits(self.processor.cpuid)
            self.memory = GuestMemory(
                size.memory_mib << 20, shared=size.shared_memory, page_map_fd=page_map_fd
            )
            resources.callback(self.memory.close)
            self.images = self._reserve_images()
            self._check_reach()
            self.loop = EventLoop()
            resources.callback(self.loop.close)
            self.vm = Vm(self.system.create_vm())
            resources.callback(self.vm.close)
            self.vm.set_tss(layout.TSS_GPA)
            self.vm.set_identity_map(layout.IDENTITY_MAP_GPA)
            self.vm.create_irqchip()
            self.vm.set_memory(self.memory)
            self.windows = layout.virtio_windows(size.fixed_windows, size.spare_windows)
            for gsi in (layout.SERIAL_GSI, *(gsi for _, gsi in self.windows)):
                self._add_irq(gsi, resources)
            run_page_bytes = self.system.run_page_bytes()
            for number in range(size.vcpu_count):
                vcpu = Vcpu(self.vm.create_vcpu(number), run_page_bytes)
                resources.callback(vcpu.close)
                self.vcpus.append(vcpu)
            self._show(self.processor)
            for vcpu in self.vcpus:
                vcpu.set_msrs(ENTRY_MSRS)
            self._resources = resources.pop_all()

    def show(self, cpuid: tuple[CpuidEntry, ...], *, tsc_deadline: bool) -> Processor:
        """Shows the guest this processor instead, which it knows; how its state is read then.

        Before a vCPU has run. HostError as KVM refuses it.
        """
        shown = self.processor._replace(cpuid=cpuid, tsc_deadline=tsc_deadline)
        if shown != self.processor:
            self._show(shown)
        return shown

    def close(self) -> None:
        """Gives everything back, guest memory after the VM."""
        self._resources.close()

    def _open_system(self, kvm_fd: int) -> System:
        try:
            self.system = System(kvm_fd)
        except BaseException:
            os.close(kvm_fd)
            raise
        return self.system

    def _show(self, processor: Processor) -> None:
        count = len(self.vcpus)
        for number, vcpu in enumerate(self.vcpus):
            vcpu.set_cpuid(
                guest_cpuid(processor.cpuid, number, count, tsc_deadline=processor.tsc_deadline)
            )

    def _reserve_images(self) -> tuple[Slot, ...]:
        gpa = layout.first_pmem_gpa(self.memory.ram_bytes)
        found = []
        for length_bytes in self.size.pmem_bytes:
            found.append(self.memory.reserve_window(length_bytes, gpa))
            gpa = layout.align_pmem(gpa + length_bytes)
        return tuple(found)

    def _check_reach(self) -> None:
        """CallerError unless the guest's processor can address all of its memory."""
        end_gpa = max(slot.gpa + slot.length_bytes for slot in self.memory.slots())
        if end_gpa > 1 << self.address_bits:
            raise CallerError(
                f"memory and images reach up to {end_gpa:#x}, but this processor has "
                f"{self.address_bits} address bits; give the guest less memory"
            )

    def _add_irq(self, gsi: int, resources: ExitStack) -> None:
        """The line `gsi`; devices that share it share its eventfd.

        With an eventfd each, KVM could raise the line for one while the pulse of another still
        holds it up, and that edge would be lost (arch/x86/kvm/ioapic.c).
        """
        if gsi not in self.irqs:
            irq = self.irqs[gsi] = IrqLine(gsi)
            resources.callback(irq.close)
            self.vm.add_irqfd(irq.fd, gsi)
