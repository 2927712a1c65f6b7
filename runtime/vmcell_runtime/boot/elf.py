"""An x86-64 ELF executable's segments into guest memory. Source: System V ABI, gABI chapter 5.

The file is somebody else's: every offset and size is checked against the file and against the room
the guest has before a byte moves. Segments go where `p_paddr` says.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.memory import GuestMemory

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01"  # 64-bit, little-endian, version 1
_ET_EXEC = 2
_EM_X86_64 = 62
_PT_LOAD = 1
_MAX_SEGMENTS = 64


class Segment(NamedTuple):
    """One PT_LOAD: `file_bytes` from `offset` of the file to `gpa`, zeros up to `memory_bytes`."""

    offset: int
    gpa: int
    file_bytes: int
    memory_bytes: int


def load_elf(fd: int, memory: GuestMemory, *, lowest_gpa: int) -> int:
    """Loads the executable open at `fd` into fresh (zero) memory; returns the entry's address.

    CallerError if it is not such a file or does not fit between `lowest_gpa` and the end of RAM,
    HostError if it cannot be read.
    """
    try:
        return _load(fd, memory, lowest_gpa)
    except OSError as error:
        raise HostError(f"reading the kernel failed: {error.strerror}") from error


def _load(fd: int, memory: GuestMemory, lowest_gpa: int) -> int:
    entry, segments = read_segments(fd)
    for segment in segments:
        end = segment.gpa + segment.memory_bytes
        room = any(
            max(start, lowest_gpa) <= segment.gpa and end <= start + length
            for start, length in memory.ram_ranges
        )
        if not room:
            raise CallerError(
                f"the kernel wants memory {segment.gpa:#x} to {end:#x}, which the guest does not "
                f"have; give it more than {memory.ram_bytes >> 20} MiB"
            )
        _copy(fd, memory, segment)
    if not any(s.gpa <= entry < s.gpa + s.memory_bytes for s in segments):
        raise CallerError(f"the kernel's entry {entry:#x} is outside of its segments")
    return entry


def read_segments(fd: int) -> tuple[int, list[Segment]]:
    """(entry, PT_LOAD segments), every offset checked against the file's length."""
    length = os.fstat(fd).st_size
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(_IDENT):
        raise CallerError("the kernel is not a 64-bit ELF file; give the built vmlinux")
    fields = _HEADER.unpack(header)
    kind, machine, entry, table = fields[1], fields[2], fields[4], fields[5]
    entry_bytes, count = fields[9], fields[10]
    if (kind, machine, entry_bytes) != (_ET_EXEC, _EM_X86_64, _SEGMENT.size):
        raise CallerError("the kernel is not an x86-64 ELF executable; give the built vmlinux")
    if not 0 < count <= _MAX_SEGMENTS or table + count * entry_bytes > length:
        raise CallerError(f"the kernel's program header table ({count} entries) is damaged")
    rows = os.pread(fd, count * entry_bytes, table)
    segments = []
    for row in _SEGMENT.iter_unpack(rows):
        kind, _, offset, _, gpa, file_bytes, memory_bytes, _ = row
        if kind != _PT_LOAD or not memory_bytes:
            continue
        if file_bytes > memory_bytes or offset + file_bytes > length:
            raise CallerError(f"the kernel's segment at {gpa:#x} is damaged or cut short")
        segments.append(Segment(offset, gpa, file_bytes, memory_bytes))
    return entry, segments


def _copy(fd: int, memory: GuestMemory, segment: Segment) -> None:
    done = 0
    while done < segment.file_bytes:
        span = (segment.gpa + done, segment.file_bytes - done)
        got = memory.preadv(fd, [span], segment.offset + done)
        if not got:
            raise CallerError(f"the kernel file ended inside the segment at {segment.gpa:#x}")
        done += got
