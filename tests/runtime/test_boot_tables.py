"""What Linux finds at its entry, against bytes worked out by hand from the specifications."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_runtime import layout
from vmcell_runtime.boot.command_line import MACHINE_ARGUMENTS, command_line
from vmcell_runtime.boot.entry import entry_regs, entry_sregs, write_tables
from vmcell_runtime.boot.mptable import mp_table
from vmcell_runtime.boot.params import boot_params
from vmcell_runtime.config import MAX_BLK, MAX_NET, MAX_PMEM, MAX_SPARE_WINDOWS
from vmcell_runtime.kvm.abi import kvm_sregs
from vmcell_runtime.memory import GuestMemory

GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(64 << 20)
    yield memory
    memory.close()


def test_floating_pointer_of_the_mp_table() -> None:
    # "_MP_", table at 0x9fc10, length 1 paragraph, revision 4, checksum, features 0
    assert mp_table(0x9FC00, 1)[:16] == bytes.fromhex("5f4d505f 10fc0900 01 04 8b 00 00000000")


def test_header_of_the_mp_table() -> None:
    table = mp_table(0x9FC00, 1)[16:]
    # PCMP, length 44 + 20 + 8 + 8 + 22 * 8 = 256, revision 4
    assert table[:7] == b"PCMP\x00\x01\x04"
    assert table[8:28] == b"VMCELL  MICROVM     "
    # no OEM table, 25 entries, LAPIC at 0xfee00000, no extended table
    assert table[28:44] == bytes.fromhex("00000000 0000 1900 0000e0fe 0000 00 00")
    assert len(table) == 256


@pytest.mark.parametrize("count", range(1, 9))
def test_the_mp_table_lists_every_processor_and_line(count: int) -> None:
    whole = mp_table(0x9FC00, count)
    assert sum(whole[:16]) & 0xFF == 0, "checksum of the pointer"
    table = whole[16:]
    assert sum(table) & 0xFF == 0, "checksum of the table"
    assert struct.unpack_from("<H", table, 4) == (len(table),)
    assert len(whole) <= layout.MP_TABLE_BYTES
    place = 44
    for number in range(count):
        # enabled, and the first one boots; family 6, FPU and APIC
        flags = 3 if number == 0 else 1
        row = bytes([0, number, 0x14, flags]) + bytes.fromhex("00060000 01020000 0000000000000000")
        assert table[place : place + 20] == row
        place += 20
    assert table[place : place + 8] == b"\x01\x00ISA   "
    assert table[place + 8 : place + 16] == bytes([2, count, 0x11, 1]) + bytes.fromhex("0000c0fe")
    place += 16
    for line in range(4, 24):
        # INT, edge and active high (0b0101), ISA line n to pin n of the IOAPIC
        assert table[place : place + 8] == bytes([3, 0, 5, 0, 0, line, count, line])
        place += 8
    assert table[place:] == bytes.fromhex("0403000000000000 0401000000 00ff01".replace(" ", ""))


def test_e820_below_3_gib() -> None:
    page = boot_params(((0, 512 << 20),))
    assert len(page) == 4096
    assert page[0x1E8] == 4
    rows = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(5)]
    assert rows == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xA0000, 0x60000, 2),
        (0x100000, (512 << 20) - 0x100000, 1),
        (0, 0, 0),
    ]


def test_e820_with_ram_above_the_hole() -> None:
    page = boot_params(((0, 3 * GIB), (4 * GIB, 5 * GIB)))
    assert page[0x1E8] == 5
    assert struct.unpack_from("<QQI", page, 0x2D0 + 60) == (0x100000, 3 * GIB - 0x100000, 1)
    assert struct.unpack_from("<QQI", page, 0x2D0 + 80) == (4 * GIB, 5 * GIB, 1)


def test_boot_params_header() -> None:
    page = boot_params(((0, 64 << 20),))
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<I", page, 0x228) == (layout.COMMAND_LINE_GPA,)
    assert struct.unpack_from("<I", page, 0x238) == (2047,)
    used = {*range(0x1E8, 0x1E9), *range(0x1FE, 0x240), *range(0x2D0, 0x2D0 + 80)}
    assert not any(byte for place, byte in enumerate(page) if place not in used)


def test_the_command_line_names_every_device_before_the_callers_part() -> None:
    line = command_line("root=/dev/pmem0  ro", [(0xD0000000, 5), (0xD0001000, 6)])
    assert line == (
        " ".join(MACHINE_ARGUMENTS).encode()
        + b" virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        + b" root=/dev/pmem0 ro\0"
    )


def test_a_command_line_linux_would_cut_is_refused() -> None:
    room = layout.COMMAND_LINE_BYTES - len(command_line("", [])) - 1
    assert len(command_line("x" * room, [])) == layout.COMMAND_LINE_BYTES
    with pytest.raises(CallerError, match="2048 bytes; Linux takes 2047"):
        command_line("x" * (room + 1), [])


def test_page_tables_map_the_first_gib_one_to_one(memory: GuestMemory) -> None:
    write_tables(memory)
    assert memory.load64(layout.PML4_GPA) == layout.PDPT_GPA | 3
    assert memory.load64(layout.PDPT_GPA) == layout.PD_GPA | 3
    assert memory.load64(layout.PDPT_GPA + 8) == 0
    entries = [memory.load64(layout.PD_GPA + 8 * n) for n in range(512)]
    assert entries == [n << 21 | 0x83 for n in range(512)]


def test_gdt_and_segments_agree(memory: GuestMemory) -> None:
    write_tables(memory)
    sregs = entry_sregs(kvm_sregs(apic_base=0xFEE00900))
    assert (sregs.gdt.base, sregs.gdt.limit) == (layout.GDT_GPA, 47)
    for segment, selector in ((sregs.cs, 0x10), (sregs.ds, 0x18), (sregs.ss, 0x18)):
        descriptor = memory.load64(layout.GDT_GPA + selector)
        assert segment.selector == selector
        # Intel SDM vol. 3 figure 3-8: type, S, DPL, P from bit 40; L, DB, G from bit 53.
        assert descriptor >> 40 & 0xF == segment.type
        assert descriptor >> 44 & 1 == segment.s
        assert descriptor >> 47 & 1 == segment.present
        assert (descriptor >> 53 & 1, descriptor >> 54 & 1, descriptor >> 55 & 1) == (
            segment.l,
            segment.db,
            segment.g,
        )
    assert sregs.cs.l == 1
    assert sregs.efer == 0x500
    assert sregs.cr3 == layout.PML4_GPA
    assert sregs.apic_base == 0xFEE00900, "what KVM gave stays"


def test_entry_registers() -> None:
    regs = entry_regs(0x1000000)
    assert (regs.rip, regs.rsi, regs.rflags) == (0x1000000, layout.BOOT_PARAMS_GPA, 2)


def test_nothing_in_the_layout_overlaps() -> None:
    pieces = sorted(
        [
            (layout.GDT_GPA, 48),
            (layout.BOOT_PARAMS_GPA, 4096),
            (layout.PML4_GPA, 4096),
            (layout.PDPT_GPA, 4096),
            (layout.PD_GPA, 4096),
            (layout.COMMAND_LINE_GPA, layout.COMMAND_LINE_BYTES),
            (layout.MP_TABLE_GPA, layout.MP_TABLE_BYTES),
            (layout.KERNEL_RAM_GPA, 1),
            (layout.VIRTIO_GPA, 64 * layout.VIRTIO_WINDOW_BYTES),
            (layout.IOAPIC_GPA, 4096),
            (layout.LAPIC_GPA, 4096),
            (layout.IDENTITY_MAP_GPA, 4096),
            (layout.TSS_GPA, 3 * 4096),
            (4 * GIB, 1),
        ]
    )
    for (gpa, length), (after, _) in pairwise(pieces):
        assert gpa + length <= after
    assert layout.STACK_TOP_GPA > layout.PD_GPA + 4096


@given(st.integers(1, 24), st.integers(0, 24))
def test_windows_share_interrupt_lines_only_when_they_must(fixed: int, spare: int) -> None:
    windows = layout.virtio_windows(fixed, spare)
    assert [gpa for gpa, _ in windows] == [0xD0000000 + 4096 * n for n in range(fixed + spare)]
    gsis = [gsi for _, gsi in windows]
    assert set(gsis) <= set(range(5, 24))
    assert gsis[: min(fixed, 19)] == list(range(5, 5 + min(fixed, 19)))
    own, shared = set(gsis[:fixed]), gsis[fixed:]
    if fixed < 19:
        assert own.isdisjoint(shared), "devices present at boot keep their lines"
        users = [shared.count(gsi) for gsi in range(5 + fixed, 24)]
        assert max(users) - min(users) <= 1, "spare windows are spread evenly"


def test_the_largest_machine_leaves_the_caller_a_command_line() -> None:
    fixed = MAX_PMEM + MAX_BLK + MAX_NET + 4
    windows = layout.virtio_windows(fixed, MAX_SPARE_WINDOWS)
    room = layout.COMMAND_LINE_BYTES - len(command_line("", windows)) - 1
    assert room >= 256
    assert len(command_line("x" * room, windows)) == layout.COMMAND_LINE_BYTES


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3 * GIB)), max_size=12)


@given(spans, st.integers(1, 5 * GIB), st.integers(0, 10 * GIB))
def test_a_plugged_image_gets_the_lowest_free_gib(
    wanted: list[tuple[int, int]], length: int, first: int
) -> None:
    taken: list[tuple[int, int]] = []
    for number, size in wanted:
        span = (number * GIB, size)
        if not any(overlap(span, other) for other in taken):
            taken.append(span)
    gpa = layout.free_pmem_gpa(first, taken, length)
    assert gpa % GIB == 0
    assert gpa >= first
    assert not any(overlap((gpa, length), span) for span in taken)
    for lower in range(layout.align_pmem(first), gpa, GIB):
        assert any(overlap((lower, length), span) for span in taken)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


@pytest.mark.parametrize(
    ("ram_bytes", "gpa"),
    [
        (64 << 20, 4 * GIB),
        (3 * GIB, 4 * GIB),
        (3 * GIB + (1 << 20), 5 * GIB),
        (8 * GIB, 9 * GIB),
    ],
)
def test_images_stand_behind_all_ram(ram_bytes: int, gpa: int) -> None:
    assert layout.first_pmem_gpa(ram_bytes) == gpa
