"""The ELF loader: segments where they say, and every damaged file a clear error."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payload import elf, memory_file

from vmcell_protos.errors import CallerError
from vmcell_runtime.boot.elf import load_elf
from vmcell_runtime.memory import GuestMemory

MIB = 1 << 20
LOWEST = MIB


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(16 * MIB)
    yield memory
    memory.close()


def load(content: bytes, memory: GuestMemory) -> int:
    fd = memory_file(content)
    try:
        return load_elf(fd, memory, lowest_gpa=LOWEST)
    finally:
        os.close(fd)


def changed(content: bytes, offset: int, layout: str, value: int) -> bytes:
    return (
        content[:offset] + struct.pack(layout, value) + content[offset + struct.calcsize(layout) :]
    )


PHDR = 64  # where `elf` puts its one program header


def test_a_segment_lands_at_its_physical_address(memory: GuestMemory) -> None:
    assert load(elf(b"code", gpa=2 * MIB, entry=2 * MIB + 1), memory) == 2 * MIB + 1
    assert memory.read(2 * MIB, 5) == b"code\0"


def test_memory_beyond_the_file_part_stays_zero(memory: GuestMemory) -> None:
    content = changed(elf(b"data", gpa=3 * MIB, entry=3 * MIB), PHDR + 40, "<Q", 4096)
    load(content, memory)
    assert memory.read(3 * MIB, 4096) == b"data" + bytes(4092)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a 64-bit ELF"),
        (b"\x7fELF" + bytes(100), "not a 64-bit ELF"),
        (b"MZ" + bytes(4096), "not a 64-bit ELF"),
        (changed(elf(b"x"), 16, "<H", 3), "not an x86-64 ELF executable"),
        (changed(elf(b"x"), 18, "<H", 183), "not an x86-64 ELF executable"),
        (changed(elf(b"x"), 54, "<H", 55), "not an x86-64 ELF executable"),
        (changed(elf(b"x"), 56, "<H", 0), "program header table"),
        (changed(elf(b"x"), 56, "<H", 65), "program header table"),
        (changed(elf(b"x"), 32, "<Q", 1 << 63), "program header table"),
        (changed(elf(b"x"), PHDR + 8, "<Q", 1 << 62), "damaged or cut short"),
        (changed(elf(b"x"), PHDR + 32, "<Q", 2), "damaged or cut short"),
        (elf(b"x" * 100)[:-1], "damaged or cut short"),
        (changed(elf(b"x"), PHDR + 40, "<Q", 1 << 40), "give it more than 16 MiB"),
        (elf(b"x", gpa=0x7000, entry=0x7000), "0x7000 to 0x7001, which the guest does not have"),
        (elf(b"x", gpa=16 * MIB, entry=16 * MIB), "which the guest does not have"),
        (elf(b"x", gpa=(1 << 64) - 1, entry=0), "which the guest does not have"),
        (elf(b"x", entry=0x100001), "entry 0x100001 is outside"),
        (changed(elf(b"x"), PHDR, "<I", 4), "entry 0x100000 is outside"),
    ],
)
def test_damage_is_named(memory: GuestMemory, content: bytes, sentence: str) -> None:
    with pytest.raises(CallerError, match=sentence):
        load(content, memory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=4))
def test_flipped_header_bytes_load_or_are_refused(
    memory: GuestMemory, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(elf(b"\xf4" * 64))
    for place, value in flips:
        content[place] = value
    try:
        entry = load(bytes(content), memory)
    except CallerError:
        return
    assert LOWEST <= entry < 16 * MIB
