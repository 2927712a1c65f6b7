"""Every guest physical address the VMM decides, drawn once.

    0x0000_0500   GDT                      6 entries of 8 bytes
    0x0000_7000   boot_params              1 page, "zero page"
    0x0000_9000   page tables              3 pages: PML4, PDPT, PD; 1 GiB mapped one to one
    0x0001_fff0   top of the entry stack   grows down to 0x0000_c000
    0x0002_0000   command line             2 KiB
    0x0009_fc00   MP table                 1 KiB, the last of base memory, where Linux looks for it
    0x000a_0000   reserved                 up to 1 MiB, as on a PC
    0x0010_0000   RAM                      the kernel's segments; up to 3 GiB
    0xc000_0000   hole                     no RAM up to 4 GiB
    0xd000_0000     virtio windows         4 KiB each, GSI 5 to 23
    0xfec0_0000     IOAPIC                 in the kernel
    0xfee0_0000     LAPICs                 in the kernel
    0xfffb_c000     KVM's own pages        identity map 1, TSS 3 (Intel hosts)
    0x1_0000_0000 RAM beyond 3 GiB
    next GiB      pmem windows             each on a GiB of its own, read-only

Ports: 0x70 CMOS, 0x3f8 serial (IRQ 4), 0x60/0x64 keyboard controller (reset only).
"""

from __future__ import annotations

from collections.abc import Iterable

from vmcell_runtime.memory import HIGH_RAM_GPA, LOW_RAM_LIMIT_BYTES

GDT_GPA = 0x500
BOOT_PARAMS_GPA = 0x7000
PML4_GPA = 0x9000
PDPT_GPA = 0xA000
PD_GPA = 0xB000
STACK_TOP_GPA = 0x1FFF0
COMMAND_LINE_GPA = 0x20000
COMMAND_LINE_BYTES = 2048  # COMMAND_LINE_SIZE of x86 Linux, with the final NUL
MP_TABLE_GPA = 0x9FC00  # mpparse.c scans the last KiB of 640 KiB
MP_TABLE_BYTES = 0x400
BASE_MEMORY_END_GPA = 0xA0000
KERNEL_RAM_GPA = 0x100000
ENTRY_MAP_BYTES = 1 << 30  # 512 entries of 2 MiB in one page directory

VIRTIO_GPA = 0xD0000000
VIRTIO_WINDOW_BYTES = 0x1000
FIRST_VIRTIO_GSI = 5  # below: 4 is the serial line, 0 to 3 keep their PC meaning
LAST_GSI = 23  # KVM's IOAPIC has 24 pins

IOAPIC_GPA = 0xFEC00000
LAPIC_GPA = 0xFEE00000
IDENTITY_MAP_GPA = 0xFFFBC000  # where QEMU and Firecracker put it too
TSS_GPA = 0xFFFBD000  # 3 pages, ends where a PC's BIOS would begin

CMOS_PORT = 0x70
CMOS_PORTS = 2
KEYBOARD_PORT = 0x60
KEYBOARD_PORTS = 5
SERIAL_PORT = 0x3F8
SERIAL_PORTS = 8
SERIAL_GSI = 4

PMEM_ALIGNMENT_BYTES = 1 << 30  # a multiple of Linux's memory sections (128 MiB)


def virtio_windows(fixed: int, spare: int) -> list[tuple[int, int]]:
    """(gpa, GSI) of each window: those of devices present at boot, then those without one yet.

    The first 19 fixed devices have a line of their own. Spare windows take turns on the lines that
    are left, on the last one if none is.
    """
    lines = range(FIRST_VIRTIO_GSI, LAST_GSI + 1)
    left = lines[fixed:] or lines[-1:]
    gsis = [lines[n % len(lines)] for n in range(fixed)]
    gsis += [left[n % len(left)] for n in range(spare)]
    return [(VIRTIO_GPA + n * VIRTIO_WINDOW_BYTES, gsi) for n, gsi in enumerate(gsis)]


def first_pmem_gpa(ram_bytes: int) -> int:
    """Where the first pmem window may stand."""
    return align_pmem(HIGH_RAM_GPA + max(0, ram_bytes - LOW_RAM_LIMIT_BYTES))


def align_pmem(gpa: int) -> int:
    """The next address a pmem window may start at."""
    return -(-gpa // PMEM_ALIGNMENT_BYTES) * PMEM_ALIGNMENT_BYTES


def free_pmem_gpa(first_gpa: int, taken: Iterable[tuple[int, int]], length_bytes: int) -> int:
    """The lowest pmem address from `first_gpa` on with so much room between the (gpa, length)."""
    gpa = align_pmem(first_gpa)
    for start, taken_bytes in sorted(taken):
        if gpa + length_bytes <= start:
            break
        gpa = max(gpa, align_pmem(start + taken_bytes))
    return gpa
