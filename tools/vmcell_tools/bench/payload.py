"""Hand-made guests: an ELF file of a few instructions of 64-bit code.

They start as a Linux would, at the 64-bit entry, and run on any /dev/kvm: under kvm_pvm each
instruction is emulated, so they are short.
"""

from __future__ import annotations

import os
import struct
import tempfile

CODE_GPA = 0x10_0000
COM1 = 0x3F8
# movw $0x3f8, %dx; movb $10, %al; 1: out %al, %dx; jmp 1b
# Ends a line with every other instruction, and each line reaches the console's file when it ends:
# the first byte there tells when the guest runs.
TALK = b"\x66\xba" + struct.pack("<H", COM1) + b"\xb0\n\xee\xeb\xfd"


_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_EXECUTABLE, _X86_64, _VERSION = 2, 62, 1
_LOAD, _NOTE, _READ_EXECUTE, _READ = 1, 4, 5, 4
_XEN_PHYS32_ENTRY = 18  # xen/include/public/elfnote.h: where PVH starts


def elf(code: bytes, *, gpa: int = CODE_GPA, entry: int = CODE_GPA) -> bytes:
    """An executable of one segment."""
    offset = _HEADER.size + _SEGMENT.size
    size = len(code)
    segment = _SEGMENT.pack(_LOAD, _READ_EXECUTE, offset, gpa, gpa, size, size, 4096)
    return _header(entry, 1) + segment + code


def pvh_elf(code: bytes) -> bytes:
    """The same for a loader that wants PVH's entry, which is 32-bit code."""
    note = struct.pack("<III4sI", 4, 4, _XEN_PHYS32_ENTRY, b"Xen", CODE_GPA)
    at, size = _HEADER.size + 2 * _SEGMENT.size, len(code)
    loaded = (_LOAD, _READ_EXECUTE, at, CODE_GPA, CODE_GPA, size, size, 4096)
    noted = (_NOTE, _READ, at + size, 0, 0, len(note), len(note), 4)
    return _header(CODE_GPA, 2) + _SEGMENT.pack(*loaded) + _SEGMENT.pack(*noted) + code + note


def _header(entry: int, segments: int) -> bytes:
    kind = (b"\x7fELF\x02\x01\x01", _EXECUTABLE, _X86_64, _VERSION)
    tables = (_HEADER.size, 0, 0, _HEADER.size, _SEGMENT.size, segments, 0, 0, 0)
    return _HEADER.pack(*kind, entry, *tables)


def memory_file(content: bytes) -> int:
    """A descriptor of an unnamed file with this content, the caller's to close."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return os.dup(file.fileno())
