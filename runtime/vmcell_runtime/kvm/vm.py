"""One VM: its memory slots, interrupt controllers, and the eventfds wired into it."""

from __future__ import annotations

import os
import struct

from vmcell_protos.errors import HostError
from vmcell_runtime.kvm.abi import (
    IRQCHIP_BYTES,
    KVM_CREATE_IRQCHIP,
    KVM_CREATE_VCPU,
    KVM_GET_CLOCK,
    KVM_GET_IRQCHIP,
    KVM_IOEVENTFD,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IRQFD,
    KVM_MEM_READONLY,
    KVM_NR_IRQCHIPS,
    KVM_SET_CLOCK,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_SET_IRQCHIP,
    KVM_SET_TSS_ADDR,
    KVM_SET_USER_MEMORY_REGION,
    identity_map_address,
    kvm_clock_data,
    kvm_ioeventfd,
    kvm_irqfd,
    kvm_userspace_memory_region,
)
from vmcell_runtime.kvm.ioctl import kvm_ioctl
from vmcell_runtime.memory import GuestMemory, Slot


class Vm:
    """Owns a VM descriptor and pins the guest memory it was given until `close` (idempotent).

    The kernel keeps a VM alive as long as any of its vCPU descriptors is open: close those first.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory: GuestMemory | None = None

    def set_memory(self, memory: GuestMemory) -> None:
        """Gives the VM every slot of `memory`, once. KVM_SET_USER_MEMORY_REGION, api.rst 4.35."""
        if self._memory is not None:
            raise ValueError("this VM already has its memory")
        memory.pin()
        self._memory = memory
        for slot in memory.slots():
            self.add_slot(slot)

    def add_slot(self, slot: Slot) -> None:
        """One slot more of the memory this VM has, also while vCPUs run; pins a file window."""
        if self._memory is None:
            raise ValueError("this VM has no memory yet")
        if slot.read_only:
            self._memory.pin_window(slot.number)
        try:
            self._set_slot(slot, slot.length_bytes)
        except HostError:
            if slot.read_only:
                self._memory.unpin_window(slot.number)
            raise

    def remove_slot(self, slot: Slot) -> None:
        """Takes a file window away; when this returns no vCPU reaches it any more."""
        if self._memory is None:
            raise ValueError("this VM has no memory yet")
        self._set_slot(slot, 0)
        self._memory.unpin_window(slot.number)

    def _set_slot(self, slot: Slot, length_bytes: int) -> None:
        region = kvm_userspace_memory_region(
            slot=slot.number,
            flags=KVM_MEM_READONLY if slot.read_only else 0,
            guest_phys_addr=slot.gpa,
            memory_size=length_bytes,
            userspace_addr=slot.host_address,
        )
        kvm_ioctl(self._fd, KVM_SET_USER_MEMORY_REGION, region)

    def set_tss(self, gpa: int) -> None:
        """Three pages Intel hosts need below 4 GiB, outside every slot. api.rst 4.36."""
        kvm_ioctl(self._fd, KVM_SET_TSS_ADDR, gpa)

    def set_identity_map(self, gpa: int) -> None:
        """One page more of the same kind; before the first vCPU. api.rst 4.48."""
        kvm_ioctl(self._fd, KVM_SET_IDENTITY_MAP_ADDR, identity_map_address(gpa))

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a LAPIC per vCPU in the kernel, GSI n at pin n. api.rst 4.24."""
        kvm_ioctl(self._fd, KVM_CREATE_IRQCHIP)

    def irqchips(self) -> tuple[bytes, ...]:
        """Both PICs and the IOAPIC, as `load_irqchips` takes them. api.rst 4.25."""
        return tuple(self._irqchip(number) for number in range(KVM_NR_IRQCHIPS))

    def _irqchip(self, number: int) -> bytes:
        buffer = bytearray(IRQCHIP_BYTES)
        buffer[:4] = number.to_bytes(4, "little")
        kvm_ioctl(self._fd, KVM_GET_IRQCHIP, buffer)
        return bytes(buffer[8:])

    def load_irqchips(self, chips: tuple[bytes, ...]) -> None:
        """Puts the chips into the state they were saved in. api.rst 4.26."""
        for number, chip in enumerate(chips):
            kvm_ioctl(self._fd, KVM_SET_IRQCHIP, bytearray(struct.pack("<II", number, 0) + chip))

    def create_vcpu(self, number: int) -> int:
        """The descriptor of vCPU `number`, which is its APIC id; the caller's to close."""
        return kvm_ioctl(self._fd, KVM_CREATE_VCPU, number)

    def add_irqfd(self, fd: int, gsi: int) -> None:
        """A write to eventfd `fd` raises and lowers `gsi`. api.rst 4.75."""
        kvm_ioctl(self._fd, KVM_IRQFD, kvm_irqfd(fd=fd, gsi=gsi))

    def add_ioeventfd(self, fd: int, gpa: int, length: int, value: int | None) -> None:
        """A guest write of `length` bytes equal to `value`, or any if None, at `gpa` signals `fd`
        without an exit. api.rst 4.59."""
        self._set_ioeventfd(fd, gpa, length, value, 0)

    def remove_ioeventfd(self, fd: int, gpa: int, length: int, value: int | None) -> None:
        """The opposite of `add_ioeventfd`, with the same values and before `fd` is closed."""
        self._set_ioeventfd(fd, gpa, length, value, KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _set_ioeventfd(self, fd: int, gpa: int, length: int, value: int | None, flags: int) -> None:
        if value is not None:
            flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        request = kvm_ioeventfd(datamatch=value or 0, addr=gpa, len=length, fd=fd, flags=flags)
        kvm_ioctl(self._fd, KVM_IOEVENTFD, request)

    def kvmclock_ns(self) -> int:
        """What the guest's kvmclock says now. KVM_GET_CLOCK, api.rst 4.29."""
        data = kvm_clock_data()
        kvm_ioctl(self._fd, KVM_GET_CLOCK, data)
        return data.clock

    def set_kvmclock_ns(self, value_ns: int) -> None:
        """Sets it; without flags, so that the host's wall clock plays no part. api.rst 4.30."""
        kvm_ioctl(self._fd, KVM_SET_CLOCK, kvm_clock_data(clock=value_ns))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._memory is not None:
            self._memory.unpin()
            self._memory = None
