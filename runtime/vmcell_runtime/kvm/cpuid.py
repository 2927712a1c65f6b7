"""The CPUID a guest sees: what KVM supports here, edited per vCPU; no I/O.

Sources: KVM api.rst 4.46 and 4.47 (KVM_GET_SUPPORTED_CPUID, and what it leaves to us), Linux
Documentation/virt/kvm/x86/cpuid.rst for leaves 0x4000000x, Intel SDM vol. 2 CPUID, AMD APM vol. 3
appendix E. One socket, one thread per core, APIC id = vCPU number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from vmcell_runtime.kvm.abi import KVM_CPUID_FLAG_SIGNIFCANT_INDEX

_ENTRY = struct.Struct("<7I12x")

ECX1_VMX = 1 << 5
ECX1_TSC_DEADLINE = 1 << 24
ECX1_HYPERVISOR = 1 << 31
EDX1_HTT = 1 << 28
ECX8001_CMP_LEGACY = 1 << 1
ECX8001_SVM = 1 << 2
ECX8001_PERFCTR_CORE = 1 << 23
# A vCPU then waits for a page of an image that the host has to read, instead of being told of it by
# an interrupt: a Linux with two vCPUs on the software CPU never went on from some of those.
EAX_KVM_ASYNC_PF = 1 << 4 | 1 << 10 | 1 << 14

_LEVEL_THREAD = 1
_LEVEL_CORE = 2
_DROPPED_LEAVES = frozenset(
    {
        0x0B,  # topology: written anew below
        0x1F,  # topology with dies: Linux falls back to 0xB
        0x8000000A,  # SVM features: nested virtualisation is never offered
    }
)


class CpuidEntry(NamedTuple):
    """`kvm_cpuid_entry2` without its padding."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def decode_cpuid(buffer: bytes | bytearray) -> list[CpuidEntry]:
    """Entries of a filled `kvm_cpuid2`."""
    count = int.from_bytes(buffer[:4], "little")
    return [CpuidEntry(*_ENTRY.unpack_from(buffer, 8 + 40 * n)) for n in range(count)]


def without_cpu_number(entries: Iterable[CpuidEntry]) -> list[CpuidEntry]:
    """The same without what depends on the host's CPU that was asked: `guest_cpuid` writes that
    anew, and two askings can be compared (SDM leaves 1, 0xB and 0x1F, APM leaf 0x8000001E)."""
    return [_anonymous(entry) for entry in entries]


def _anonymous(entry: CpuidEntry) -> CpuidEntry:
    match entry.function:
        case 0x1:
            return entry._replace(ebx=entry.ebx & 0xFF_FFFF)
        case 0xB | 0x1F:
            return entry._replace(edx=0)
        case 0x8000001E:
            return entry._replace(eax=0, ebx=0, ecx=0)
    return entry


def encode_cpuid(entries: list[CpuidEntry]) -> bytearray:
    """A `kvm_cpuid2` with these entries."""
    packed = [struct.pack("<II", len(entries), 0), *(_ENTRY.pack(*entry) for entry in entries)]
    return bytearray(b"".join(packed))


def guest_cpuid(
    supported: Iterable[CpuidEntry], vcpu: int, vcpu_count: int, *, tsc_deadline: bool
) -> list[CpuidEntry]:
    """The entries for one vCPU. Without `tsc_deadline` the guest must calibrate its APIC timer."""
    entries = [
        _edit(entry, vcpu, vcpu_count, tsc_deadline)
        for entry in supported
        if entry.function not in _DROPPED_LEAVES
    ]
    if any(entry.function == 0 and entry.eax >= 0x0B for entry in entries):
        entries += _topology(vcpu, vcpu_count)
    return entries


def physical_address_bits(entries: Iterable[CpuidEntry]) -> int:
    """MAXPHYADDR of leaf 0x80000008; 36 where the processor does not say (AMD APM E.4.7)."""
    for entry in entries:
        if entry.function == 0x80000008:
            return entry.eax & 0xFF
    return 36


def _edit(entry: CpuidEntry, vcpu: int, vcpu_count: int, tsc_deadline: bool) -> CpuidEntry:
    id_bits = (vcpu_count - 1).bit_length()
    match entry.function:
        case 0x1:
            ebx = entry.ebx & 0xFFFF | vcpu << 24 | (1 << id_bits) << 16
            ecx = (entry.ecx | ECX1_HYPERVISOR) & ~(ECX1_VMX | ECX1_TSC_DEADLINE)
            ecx |= ECX1_TSC_DEADLINE if tsc_deadline else 0
            edx = _with_bit(entry.edx, EDX1_HTT, vcpu_count > 1)
            return entry._replace(ebx=ebx, ecx=ecx, edx=edx)
        case 0x4 | 0x8000001D if entry.eax & 0x1F:
            return entry._replace(eax=_cache_sharing(entry, vcpu_count))
        case 0xA:
            return entry._replace(eax=0, ebx=0, ecx=0, edx=0)  # no performance counters
        case 0x80000001:
            ecx = entry.ecx & ~(ECX8001_SVM | ECX8001_PERFCTR_CORE)
            return entry._replace(ecx=_with_bit(ecx, ECX8001_CMP_LEGACY, vcpu_count > 1))
        case 0x80000008:
            ecx = entry.ecx & ~0xF0FF | id_bits << 12 | vcpu_count - 1
            return entry._replace(ecx=ecx)
        case 0x40000001:
            return entry._replace(eax=entry.eax & ~EAX_KVM_ASYNC_PF)
        case 0x8000001E:
            return entry._replace(eax=vcpu, ebx=vcpu, ecx=0)
    return entry


def _cache_sharing(entry: CpuidEntry, vcpu_count: int) -> int:
    """EAX of a cache leaf: levels 1 and 2 belong to one core, outer ones to all (SDM leaf 4)."""
    level = entry.eax >> 5 & 7
    sharing = vcpu_count - 1 if level >= 3 else 0
    cores = vcpu_count - 1 if entry.function == 0x4 else 0
    return entry.eax & 0x3FFF | sharing << 14 | cores << 26


def _topology(vcpu: int, vcpu_count: int) -> list[CpuidEntry]:
    """Leaf 0xB: one thread per core, all cores in one package (SDM, CPUID leaf 0BH)."""
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    id_bits = (vcpu_count - 1).bit_length()
    return [
        CpuidEntry(0x0B, 0, flags, 0, 1, _LEVEL_THREAD << 8, vcpu),
        CpuidEntry(0x0B, 1, flags, id_bits, vcpu_count, _LEVEL_CORE << 8 | 1, vcpu),
        CpuidEntry(0x0B, 2, flags, 0, 0, 2, vcpu),
    ]


def _with_bit(value: int, bit: int, wanted: bool) -> int:
    return value | bit if wanted else value & ~bit
