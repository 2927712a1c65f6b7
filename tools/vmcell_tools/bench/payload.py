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


def elf(code: bytes, *, gpa: int = CODE_GPA, entry: int = CODE_GPA) -> bytes:
    """An executable of one segment."""
    identity = b"\x7fELF\x02\x01\x01"
    executable, x86_64, version = 2, 62, 1
    header_bytes, program_header_bytes = 64, 56
    kinds = (executable, x86_64, version)
    tables = (header_bytes, program_header_bytes, 1, 0, 0, 0)
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, *kinds, entry, header_bytes, 0, 0, *tables)
    loaded, readable_executable, offset = 1, 5, header_bytes + program_header_bytes
    where = (offset, gpa, gpa, len(code), len(code), 4096)
    return header + struct.pack("<IIQQQQQQ", loaded, readable_executable, *where) + code


def memory_file(content: bytes) -> int:
    """A descriptor of an unnamed file with this content, the caller's to close."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return os.dup(file.fileno())
