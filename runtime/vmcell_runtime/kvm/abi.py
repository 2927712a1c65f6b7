"""<linux/kvm.h> and <asm/kvm.h> of x86-64 as far as we use them; declarations only.

Names are the kernel's. Request numbers follow the `_IOC` rule of <asm-generic/ioctl.h> and take
their size from the struct. A test compiles a C probe and compares every number, size and offset.
"""

from __future__ import annotations

import ctypes
from typing import Annotated

from vmcell_runtime.kvm.layouts import c_struct, s32, u8, u16, u32, u64

KVM_API_VERSION = 12
KVMIO = 0xAE

_IOC_WRITE = 1
_IOC_READ = 2

u8x5 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 5]
u8x6 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 6]
u8x8 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]
u8x16 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]
u8x36 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 36]
u8x128 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 128]
u8x256 = Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 256]
u16x3 = Annotated[ctypes.Array[ctypes.c_uint16], ctypes.c_uint16 * 3]
u32x3 = Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 3]
u32x4 = Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 4]
u64x4 = Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]
u64x16 = Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


def request_size(request: int) -> int:
    """The size field of a request number: how many bytes the kernel copies in or out."""
    return (request >> 16) & 0x3FFF


def _ioc(direction: int, number: int, size_bytes: int) -> int:
    return direction << 30 | size_bytes << 16 | KVMIO << 8 | number


def _io(number: int) -> int:
    return _ioc(0, number, 0)


def _ior(number: int, struct: type[ctypes.Structure]) -> int:
    return _ioc(_IOC_READ, number, ctypes.sizeof(struct))


def _iow(number: int, struct: type[ctypes.Structure]) -> int:
    return _ioc(_IOC_WRITE, number, ctypes.sizeof(struct))


def _iowr(number: int, struct: type[ctypes.Structure]) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, number, ctypes.sizeof(struct))


def _opaque(direction: int, number: int, size_bytes: int) -> int:
    """A request whose struct is carried from one ioctl to another and never looked into."""
    return _ioc(direction, number, size_bytes)


# Memory


@c_struct(32)
class kvm_userspace_memory_region(ctypes.Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


KVM_MEM_READONLY = 1 << 1

# Interrupts and notifications


@c_struct(32)
class kvm_irqfd(ctypes.Structure):
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: u8x16


@c_struct(64)
class kvm_ioeventfd(ctypes.Structure):
    datamatch: u64
    addr: u64
    len: u32
    fd: s32
    flags: u32
    pad: u8x36


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

# Time


@c_struct(48)
class kvm_clock_data(ctypes.Structure):
    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: u32x4


@c_struct(24)
class kvm_device_attr(ctypes.Structure):
    flags: u32
    group: u32
    attr: u64
    addr: u64


KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
MSR_IA32_TSC = 0x10
MSR_IA32_TSC_DEADLINE = 0x6E0


@c_struct(4)
class kvm_msr_list(ctypes.Structure):
    """Header; `nmsrs` indices of 4 bytes follow."""

    nmsrs: u32


# Registers


@c_struct(144)
class kvm_regs(ctypes.Structure):
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@c_struct(24)
class kvm_segment(ctypes.Structure):
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8  # noqa: E741, as the header names it
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@c_struct(16)
class kvm_dtable(ctypes.Structure):
    base: u64
    limit: u16
    padding: u16x3


@c_struct(312)
class kvm_sregs(ctypes.Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: u64x4


@c_struct(416)
class kvm_fpu(ctypes.Structure):
    fpr: u8x128
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: u8x256
    mxcsr: u32
    pad2: u32


@c_struct(4)
class kvm_mp_state(ctypes.Structure):
    mp_state: u32


KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1


@c_struct(16)
class kvm_msr_entry(ctypes.Structure):
    index: u32
    reserved: u32
    data: u64


@c_struct(8)
class kvm_msrs(ctypes.Structure):
    """Header; `nmsrs` entries of kvm_msr_entry follow."""

    nmsrs: u32
    pad: u32


@c_struct(40)
class kvm_cpuid_entry2(ctypes.Structure):
    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: u32x3


@c_struct(8)
class kvm_cpuid2(ctypes.Structure):
    """Header; `nent` entries of kvm_cpuid_entry2 follow."""

    nent: u32
    padding: u32


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0

# The run page


@c_struct(16)
class kvm_run_io(ctypes.Structure):
    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@c_struct(24)
class kvm_run_mmio(ctypes.Structure):
    phys_addr: u64
    data: u8x8
    len: u32
    is_write: u8


@c_struct(136)
class kvm_run_internal(ctypes.Structure):
    suberror: u32
    ndata: u32
    data: u64x16


@c_struct(136)
class kvm_run_system_event(ctypes.Structure):
    type: u32
    ndata: u32
    data: u64x16


@c_struct(16)
class kvm_run_fail_entry(ctypes.Structure):
    hardware_entry_failure_reason: u64
    cpu: u32


@c_struct(256)
class kvm_run_exit(ctypes.Union):
    io: kvm_run_io
    mmio: kvm_run_mmio
    internal: kvm_run_internal
    system_event: kvm_run_system_event
    fail_entry: kvm_run_fail_entry
    padding: u8x256


@c_struct(288)
class kvm_run(ctypes.Structure):
    """The head of the page; `exit` is the header's unnamed union. kvm_valid_regs follows."""

    request_interrupt_window: u8
    immediate_exit: u8
    padding1: u8x6
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    exit: kvm_run_exit


KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

# Capabilities

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_IRQFD = 32
KVM_CAP_IOEVENTFD = 36
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_XSAVE2 = 208

# Requests of /dev/kvm

KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, kvm_msr_list)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, kvm_cpuid2)

# Requests of a VM


class identity_map_address(ctypes.Structure):
    """The `__u64` KVM_SET_IDENTITY_MAP_ADDR takes."""

    _fields_ = (("address", ctypes.c_uint64),)


KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, identity_map_address)
KVM_CREATE_IRQCHIP = _io(0x60)
IRQCHIP_BYTES = 520  # struct kvm_irqchip: u32 chip_id, u32 pad, 512 bytes of the chip
KVM_NR_IRQCHIPS = 3  # both PICs and the IOAPIC
KVM_GET_IRQCHIP = _opaque(_IOC_READ | _IOC_WRITE, 0x62, IRQCHIP_BYTES)
KVM_SET_IRQCHIP = _opaque(_IOC_READ, 0x63, IRQCHIP_BYTES)
KVM_IRQFD = _iow(0x76, kvm_irqfd)
KVM_IOEVENTFD = _iow(0x79, kvm_ioeventfd)
KVM_SET_CLOCK = _iow(0x7B, kvm_clock_data)
KVM_GET_CLOCK = _ior(0x7C, kvm_clock_data)

# Requests of a vCPU

KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, kvm_regs)
KVM_SET_REGS = _iow(0x82, kvm_regs)
KVM_GET_SREGS = _ior(0x83, kvm_sregs)
KVM_SET_SREGS = _iow(0x84, kvm_sregs)
KVM_GET_MSRS = _iowr(0x88, kvm_msrs)
KVM_SET_MSRS = _iow(0x89, kvm_msrs)
KVM_SET_FPU = _iow(0x8D, kvm_fpu)
LAPIC_BYTES = 1024  # struct kvm_lapic_state
KVM_GET_LAPIC = _opaque(_IOC_READ, 0x8E, LAPIC_BYTES)
KVM_SET_LAPIC = _opaque(_IOC_WRITE, 0x8F, LAPIC_BYTES)
KVM_SET_CPUID2 = _iow(0x90, kvm_cpuid2)
KVM_GET_MP_STATE = _ior(0x98, kvm_mp_state)
KVM_SET_MP_STATE = _iow(0x99, kvm_mp_state)
EVENTS_BYTES = 64  # struct kvm_vcpu_events
KVM_GET_VCPU_EVENTS = _opaque(_IOC_READ, 0x9F, EVENTS_BYTES)
KVM_SET_VCPU_EVENTS = _opaque(_IOC_WRITE, 0xA0, EVENTS_BYTES)
DEBUGREGS_BYTES = 128  # struct kvm_debugregs
KVM_GET_DEBUGREGS = _opaque(_IOC_READ, 0xA1, DEBUGREGS_BYTES)
KVM_SET_DEBUGREGS = _opaque(_IOC_WRITE, 0xA2, DEBUGREGS_BYTES)
KVM_SET_TSC_KHZ = _io(0xA2)
KVM_GET_TSC_KHZ = _io(0xA3)
XSAVE_BYTES = 4096  # struct kvm_xsave; more where KVM_CAP_XSAVE2 says so
KVM_GET_XSAVE = _opaque(_IOC_READ, 0xA4, XSAVE_BYTES)
KVM_SET_XSAVE = _opaque(_IOC_WRITE, 0xA5, XSAVE_BYTES)
XCRS_BYTES = 392  # struct kvm_xcrs
KVM_GET_XCRS = _opaque(_IOC_READ, 0xA6, XCRS_BYTES)
KVM_SET_XCRS = _opaque(_IOC_WRITE, 0xA7, XCRS_BYTES)
KVM_KVMCLOCK_CTRL = _io(0xAD)
KVM_GET_XSAVE2 = _opaque(_IOC_READ, 0xCF, XSAVE_BYTES)
KVM_SET_DEVICE_ATTR = _iow(0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = _iow(0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = _iow(0xE3, kvm_device_attr)

REQUEST_NAMES: dict[int, str] = {
    value: name
    for name, value in list(globals().items())
    if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == KVMIO
}

FLEXIBLE_ENTRY_BYTES: dict[int, int] = {
    KVM_GET_MSR_INDEX_LIST: 4,
    KVM_GET_SUPPORTED_CPUID: ctypes.sizeof(kvm_cpuid_entry2),
    KVM_SET_CPUID2: ctypes.sizeof(kvm_cpuid_entry2),
    KVM_GET_MSRS: ctypes.sizeof(kvm_msr_entry),
    KVM_SET_MSRS: ctypes.sizeof(kvm_msr_entry),
}
"""Requests whose struct ends in entries that its first u32 counts: bytes of one entry."""
