"""Hand-made guests: a few instructions of 64-bit code in an ELF file, for the lane `kvm`.

They start as a Linux would, at the 64-bit entry, and run on any /dev/kvm: under kvm_pvm each
instruction is emulated, so they are short.
"""

from __future__ import annotations

import os
import struct
import tempfile

CODE_GPA = 0x10_0000
HLT_FOREVER = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
SPIN = b"\xeb\xfe"
TRIPLE_FAULT = b"\x0f\x0b"  # ud2 with an empty IDT
RESET = b"\xb0\xfe\xe6\x64"  # mov al, 0xfe; out 0x64, al


def out8(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes([value]) + b"\xee"


def in8(port: int) -> bytes:
    """mov dx, port; in al, dx."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xec"


def say(text: bytes) -> bytes:
    """The text to COM1, byte by byte."""
    return b"".join(out8(0x3F8, byte) for byte in text)


def store32(gpa: int, value: int) -> bytes:
    """mov rbx, gpa; mov dword [rbx], value."""
    return b"\x48\xbb" + struct.pack("<Q", gpa) + b"\xc7\x03" + struct.pack("<I", value)


def load32(gpa: int) -> bytes:
    """mov rbx, gpa; mov eax, [rbx]."""
    return b"\x48\xbb" + struct.pack("<Q", gpa) + b"\x8b\x03"


def elf(code: bytes, *, gpa: int = CODE_GPA, entry: int = CODE_GPA) -> bytes:
    """An executable of one segment."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,
        62,
        1,
        entry,
        64,
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, gpa, gpa, len(code), len(code), 4096)
    return header + segment + code


def memory_file(content: bytes) -> int:
    """A descriptor of an unnamed file with this content, the caller's to close."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return os.dup(file.fileno())
