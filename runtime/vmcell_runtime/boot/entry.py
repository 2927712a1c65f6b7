"""The processor's state at a 64-bit entry: page tables, GDT, registers.

Source: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol": long mode, paging on with the
kernel and boot_params mapped one to one, CS = 0x10, DS = ES = SS = 0x18, RSI = boot_params.
"""

from __future__ import annotations

import struct

from vmcell_runtime.kvm.abi import kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs
from vmcell_runtime.layout import (
    BOOT_PARAMS_GPA,
    ENTRY_MAP_BYTES,
    GDT_GPA,
    PD_GPA,
    PDPT_GPA,
    PML4_GPA,
    STACK_TOP_GPA,
)
from vmcell_runtime.memory import HUGE_PAGE_BYTES, GuestMemory

CODE_SELECTOR, DATA_SELECTOR, TSS_SELECTOR = 0x10, 0x18, 0x20

# Intel SDM vol. 3 § 3.4.5: base 0, limit 4 GiB in pages; code is 64-bit, TSS is 16 bytes long.
GDT = (
    0,
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x0000_8B00_0000_0067,
    0,
)

_PRESENT_WRITABLE = 0x3
_HUGE_PAGE = 0x80

_CR0 = 0x8001_0033  # PG, WP, NE, ET, MP, PE
_CR4_PAE = 0x20
_EFER_LME_LMA = 0x500
_RFLAGS_FIXED = 0x2
_FPU_CONTROL = 0x37F  # after FNINIT
_MXCSR = 0x1F80  # after reset

MSR_IA32_MISC_ENABLE = 0x1A0
MSR_IA32_MTRR_DEF_TYPE = 0x2FF
ENTRY_MSRS = {
    MSR_IA32_MISC_ENABLE: 1,  # fast string operations
    MSR_IA32_MTRR_DEF_TYPE: 0x806,  # MTRRs on, everything write-back
}


def write_tables(memory: GuestMemory) -> None:
    """Page tables that map the first GiB one to one in 2 MiB pages, and the GDT."""
    memory.store64(PML4_GPA, PDPT_GPA | _PRESENT_WRITABLE)
    memory.store64(PDPT_GPA, PD_GPA | _PRESENT_WRITABLE)
    pages = range(0, ENTRY_MAP_BYTES, HUGE_PAGE_BYTES)
    directory = [gpa | _HUGE_PAGE | _PRESENT_WRITABLE for gpa in pages]
    memory.write(PD_GPA, struct.pack(f"<{len(directory)}Q", *directory))
    memory.write(GDT_GPA, struct.pack(f"<{len(GDT)}Q", *GDT))


def entry_sregs(sregs: kvm_sregs) -> kvm_sregs:
    """`sregs` as KVM gave them, put into long mode; its APIC base stays."""
    data = _segment(DATA_SELECTOR, type=3, db=1, s=1, g=1, limit=0xFFFFFFFF)
    sregs.cs = _segment(CODE_SELECTOR, type=11, l=1, s=1, g=1, limit=0xFFFFFFFF)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = _segment(TSS_SELECTOR, type=11, limit=0x67)
    sregs.gdt = kvm_dtable(base=GDT_GPA, limit=8 * len(GDT) - 1)
    sregs.idt = kvm_dtable(base=0, limit=0)
    sregs.cr0, sregs.cr3, sregs.cr4 = _CR0, PML4_GPA, _CR4_PAE
    sregs.efer = _EFER_LME_LMA
    return sregs


def entry_regs(rip: int) -> kvm_regs:
    """General registers: interrupts off, RSI at boot_params, a small stack."""
    return kvm_regs(rip=rip, rsi=BOOT_PARAMS_GPA, rsp=STACK_TOP_GPA, rflags=_RFLAGS_FIXED)


def entry_fpu() -> kvm_fpu:
    """The x87 and SSE control words of a processor after reset."""
    return kvm_fpu(fcw=_FPU_CONTROL, mxcsr=_MXCSR)


def _segment(selector: int, **attributes: int) -> kvm_segment:
    return kvm_segment(selector=selector, present=1, **attributes)
