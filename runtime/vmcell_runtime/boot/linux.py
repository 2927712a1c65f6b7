"""A Linux kernel and all it looks for at its 64-bit entry, into guest memory."""

from __future__ import annotations

from collections.abc import Sequence

from vmcell_runtime.boot.command_line import command_line
from vmcell_runtime.boot.elf import load_elf
from vmcell_runtime.boot.entry import write_tables
from vmcell_runtime.boot.mptable import mp_table
from vmcell_runtime.boot.params import boot_params
from vmcell_runtime.layout import (
    BOOT_PARAMS_GPA,
    COMMAND_LINE_GPA,
    KERNEL_RAM_GPA,
    MP_TABLE_GPA,
)
from vmcell_runtime.memory import GuestMemory


def load_linux(
    memory: GuestMemory,
    kernel_fd: int,
    caller_command_line: str,
    windows: Sequence[tuple[int, int]],
    vcpu_count: int,
) -> int:
    """Fills fresh memory; returns the entry's address. `windows` as in `command_line`."""
    entry = load_elf(kernel_fd, memory, lowest_gpa=KERNEL_RAM_GPA)
    write_tables(memory)
    memory.write(MP_TABLE_GPA, mp_table(MP_TABLE_GPA, vcpu_count))
    memory.write(COMMAND_LINE_GPA, command_line(caller_command_line, windows))
    memory.write(BOOT_PARAMS_GPA, boot_params(memory.ram_ranges))
    return entry
