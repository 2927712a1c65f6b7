"""Instructions for hand-made guests, for the lane `kvm`; vmcell_tools.bench.payload has the ELF."""

from __future__ import annotations

import struct

from vmcell_tools.bench.payload import CODE_GPA as CODE_GPA
from vmcell_tools.bench.payload import elf as elf
from vmcell_tools.bench.payload import memory_file as memory_file

HLT_FOREVER = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
SPIN = b"\xeb\xfe"
TRIPLE_FAULT = b"\x0f\x0b"  # ud2 with an empty IDT
JUMP_OUT_OF_MEMORY = b"\xb8\x00\x00\x00\x30\xff\xe0"  # mov eax, 0x30000000; jmp rax
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


def say_virtualisation() -> bytes:
    """Says "0" if CPUID shows neither VMX (1.ecx bit 5) nor SVM (80000001h.ecx bit 2), else "1"."""
    asked = b"\x31\xc9\x0f\xa2"  # xor ecx, ecx; cpuid
    vmx = b"\xb8\x01\x00\x00\x00" + asked + b"\xc1\xe9\x05\x83\xe1\x01\x89\xce"  # to esi
    svm = b"\xb8\x01\x00\x00\x80" + asked + b"\xc1\xe9\x02\x83\xe1\x01"  # to ecx
    digit = b"\x09\xf1\x83\xc1\x30\x89\xc8"  # or ecx, esi; add ecx, '0'; mov eax, ecx
    return vmx + svm + digit + b"\x66\xba\xf8\x03\xee"  # mov dx, 0x3f8; out dx, al
