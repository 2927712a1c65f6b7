"""/dev/kvm: what it offers, and the start of every VM. KVM api.rst 4.1 to 4.5, 4.46."""

from __future__ import annotations

import os

from vmcell_protos.errors import HostError
from vmcell_runtime.kvm.abi import (
    KVM_API_VERSION,
    KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_IOEVENTFD,
    KVM_CAP_IRQCHIP,
    KVM_CAP_IRQFD,
    KVM_CAP_READONLY_MEM,
    KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_XSAVE2,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    XSAVE_BYTES,
)
from vmcell_runtime.kvm.cpuid import CpuidEntry, decode_cpuid
from vmcell_runtime.kvm.ioctl import kvm_ioctl

_REQUIRED = {
    KVM_CAP_IRQCHIP: "KVM_CAP_IRQCHIP",
    KVM_CAP_USER_MEMORY: "KVM_CAP_USER_MEMORY",
    KVM_CAP_IRQFD: "KVM_CAP_IRQFD",
    KVM_CAP_IOEVENTFD: "KVM_CAP_IOEVENTFD",
    KVM_CAP_READONLY_MEM: "KVM_CAP_READONLY_MEM",
    KVM_CAP_IMMEDIATE_EXIT: "KVM_CAP_IMMEDIATE_EXIT",
}
_MAX_CPUID_ENTRIES = 256
_MAX_MSRS = 1024


class System:
    """Owns a descriptor of /dev/kvm; `close` is idempotent and leaves VMs made from it alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        version = kvm_ioctl(fd, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            raise HostError(f"/dev/kvm speaks API version {version}, not {KVM_API_VERSION}")
        missing = [name for cap, name in _REQUIRED.items() if not self.check_extension(cap)]
        if missing:
            raise HostError(f"/dev/kvm lacks {', '.join(missing)}; a newer host kernel has them")

    def check_extension(self, capability: int) -> int:
        """0: not offered; else 1 or the number the capability documents."""
        return kvm_ioctl(self._fd, KVM_CHECK_EXTENSION, capability)

    @property
    def tsc_deadline(self) -> bool:
        return self.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0

    def supported_cpuid(self) -> list[CpuidEntry]:
        """What KVM and this processor can give a guest, unedited."""
        buffer = bytearray(8 + 40 * _MAX_CPUID_ENTRIES)
        buffer[:4] = _MAX_CPUID_ENTRIES.to_bytes(4, "little")
        kvm_ioctl(self._fd, KVM_GET_SUPPORTED_CPUID, buffer)
        return decode_cpuid(buffer)

    def saved_msrs(self) -> list[int]:
        """The MSRs that make up a vCPU's state. KVM_GET_MSR_INDEX_LIST, api.rst 4.3."""
        buffer = bytearray(4 + 4 * _MAX_MSRS)
        buffer[:4] = _MAX_MSRS.to_bytes(4, "little")
        kvm_ioctl(self._fd, KVM_GET_MSR_INDEX_LIST, buffer)
        count = int.from_bytes(buffer[:4], "little")
        return [int.from_bytes(buffer[4 * n : 4 * n + 4], "little") for n in range(1, count + 1)]

    def xsave_bytes(self) -> int:
        """Length of a vCPU's extended state: 4096, or more on processors with AMX. api.rst 5."""
        return max(XSAVE_BYTES, self.check_extension(KVM_CAP_XSAVE2))

    def run_page_bytes(self) -> int:
        """Length of the shared page of a vCPU."""
        return kvm_ioctl(self._fd, KVM_GET_VCPU_MMAP_SIZE)

    def create_vm(self) -> int:
        """The descriptor of a new VM, the caller's to close."""
        return kvm_ioctl(self._fd, KVM_CREATE_VM)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
