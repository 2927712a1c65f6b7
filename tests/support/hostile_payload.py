"""The hostile payload (tests/hostile/payload): compiled once, a seed in each copy."""

from __future__ import annotations

import struct
import subprocess
from enum import IntEnum
from pathlib import Path

from payload import CODE_GPA, elf

from vmcell_runtime.kvm.host_kind import host_kind

SOURCES = Path(__file__).parents[1] / "hostile" / "payload"
MEMORY_MIB = 96  # RAM_BYTES in machine.h
ENTRY_GPA = CODE_GPA + 64
SECOND_ENTRY_GPA = CODE_GPA + 192
_HEADER = struct.Struct("<QII")  # seed, flags, way into ring 3
_IRET, _SYSEXIT = 0, 1

_COMPILE = (
    *("gcc", "-O2", "-ffreestanding", "-fno-builtin", "-fno-tree-loop-distribute-patterns"),
    *("-fno-pie", "-fno-stack-protector", "-mgeneral-regs-only", "-mno-red-zone"),
    *("-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    *("-Wall", "-Wextra", "-Wno-sign-compare", "-Werror"),
    *("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none,--no-warn-rwx-segments"),
)


class Order(IntEnum):
    """What the guest can be told to do, as `storm.c` has it; by the balloon's size in MiB."""

    STORM = 0
    NOTIFY_STORM = 1
    SPIN = 2
    RESET_LINE = 3
    TRIPLE_FAULT = 4
    RESET_PROCESSOR = 5
    SLEEP = 6
    INTERRUPTS = 7
    TELL = 8
    HEAVY = 9


def build(folder: Path) -> bytes:
    """The payload as one flat piece for CODE_GPA."""
    linked, flat = folder / "payload.elf", folder / "payload.bin"
    sources = [SOURCES / "entry.S", *sorted(SOURCES.glob("*.c"))]
    link = [f"-Wl,-e,{ENTRY_GPA:#x}", "-T", str(SOURCES / "payload.ld"), "-o", str(linked)]
    subprocess.run([*_COMPILE, *link, *map(str, sources)], check=True, timeout=120)
    subprocess.run(["objcopy", "-O", "binary", linked, flat], check=True, timeout=60)
    return flat.read_bytes()


def kernel(built: bytes, seed: int, *, flood: bool) -> bytes:
    """The ELF that does what `seed` says; with `flood` the console is not spared."""
    way = _SYSEXIT if host_kind().kind == "pvm" else _IRET
    header = _HEADER.pack(seed, int(flood), way)
    return elf(header + built[_HEADER.size :], entry=ENTRY_GPA)
