"""boot_params, the "zero page" of the x86 boot protocol, with the e820 map.

Source: Linux Documentation/arch/x86/boot.rst and zero-page.rst; <asm/bootparam.h>.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmcell_runtime.layout import (
    BASE_MEMORY_END_GPA,
    COMMAND_LINE_BYTES,
    COMMAND_LINE_GPA,
    KERNEL_RAM_GPA,
    MP_TABLE_GPA,
)

BOOT_PARAMS_BYTES = 4096
E820_RAM = 1
E820_RESERVED = 2

_E820_COUNT = 0x1E8
_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_LOADER_TYPE = 0x210
_COMMAND_LINE = 0x228
_KERNEL_ALIGNMENT = 0x230
_COMMAND_LINE_SIZE = 0x238
_E820_TABLE = 0x2D0
_LOADER_UNDEFINED = 0xFF


def e820_map(ram_ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(gpa, length, type) rows; the range of the MP table up to 1 MiB is reserved, as on a PC."""
    (_, low_length), *high = ram_ranges
    return [
        (0, MP_TABLE_GPA, E820_RAM),
        (MP_TABLE_GPA, BASE_MEMORY_END_GPA - MP_TABLE_GPA, E820_RESERVED),
        (BASE_MEMORY_END_GPA, KERNEL_RAM_GPA - BASE_MEMORY_END_GPA, E820_RESERVED),
        (KERNEL_RAM_GPA, low_length - KERNEL_RAM_GPA, E820_RAM),
        *((gpa, length, E820_RAM) for gpa, length in high),
    ]


def boot_params(ram_ranges: Sequence[tuple[int, int]]) -> bytes:
    """The page a 64-bit entry finds in RSI."""
    page = bytearray(BOOT_PARAMS_BYTES)
    struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    page[_HEADER_MAGIC : _HEADER_MAGIC + 4] = b"HdrS"
    page[_LOADER_TYPE] = _LOADER_UNDEFINED
    struct.pack_into("<I", page, _COMMAND_LINE, COMMAND_LINE_GPA)
    struct.pack_into("<I", page, _KERNEL_ALIGNMENT, 1 << 24)
    struct.pack_into("<I", page, _COMMAND_LINE_SIZE, COMMAND_LINE_BYTES - 1)
    rows = e820_map(ram_ranges)
    page[_E820_COUNT] = len(rows)
    for number, row in enumerate(rows):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * number, *row)
    return bytes(page)
