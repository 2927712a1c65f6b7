"""The MP table, by which a Linux without ACPI finds processors and interrupt lines.

Source: Intel MultiProcessor Specification 1.4, chapter 4; read by arch/x86/kernel/mpparse.c.
"""

from __future__ import annotations

import struct

from vmcell_runtime.layout import IOAPIC_GPA, LAPIC_GPA, LAST_GSI, SERIAL_GSI

_SPEC_REVISION = 4
_LAPIC_VERSION = 0x14
_IOAPIC_VERSION = 0x11
_ISA_BUS = 0
_CPU_ENABLED = 1
_CPU_BOOT = 2
_CPU_SIGNATURE = 0x600
_CPU_FEATURES = 0x201  # FPU and APIC
_INT, _NMI, _EXTINT = 0, 1, 3
_EDGE_ACTIVE_HIGH = 0b0101  # polarity 1, trigger 1
_ALL_LAPICS = 0xFF


def mp_table(gpa: int, vcpu_count: int) -> bytes:
    """Floating pointer and configuration table, to be written at `gpa` (a multiple of 16).

    APIC ids are vCPU numbers; the IOAPIC's is the next. Interrupt lines 4 to 23 are edge-triggered,
    active high, line n at pin n. Lines 0 to 3 have no device.
    """
    floating = struct.pack("<4sIBBB5x", b"_MP_", gpa + 16, 1, _SPEC_REVISION, 0)
    return _with_checksum(floating, 10) + _configuration(vcpu_count)


def _configuration(vcpu_count: int) -> bytes:
    entries = [_processor(number) for number in range(vcpu_count)]
    entries.append(struct.pack("<BB6s", 1, _ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, vcpu_count, _IOAPIC_VERSION, 1, IOAPIC_GPA))
    for line in range(SERIAL_GSI, LAST_GSI + 1):
        entries.append(_interrupt(3, _INT, _EDGE_ACTIVE_HIGH, line, vcpu_count, line))
    entries.append(_interrupt(4, _EXTINT, 0, 0, 0, 0))
    entries.append(_interrupt(4, _NMI, 0, 0, _ALL_LAPICS, 1))
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBx",
        b"PCMP",
        44 + len(body),
        _SPEC_REVISION,
        0,
        b"VMCELL  ",
        b"MICROVM     ",
        0,
        0,
        len(entries),
        LAPIC_GPA,
        0,
        0,
    )
    return _with_checksum(header + body, 7)


def _processor(number: int) -> bytes:
    flags = _CPU_ENABLED | (_CPU_BOOT if number == 0 else 0)
    return struct.pack("<BBBBII8x", 0, number, _LAPIC_VERSION, flags, _CPU_SIGNATURE, _CPU_FEATURES)


def _interrupt(entry: int, kind: int, flags: int, line: int, apic: int, pin: int) -> bytes:
    return struct.pack("<BBHBBBB", entry, kind, flags, _ISA_BUS, line, apic, pin)


def _with_checksum(table: bytes, offset: int) -> bytes:
    """`table` with the byte at `offset` (zero so far) set so that all bytes sum to 0."""
    return table[:offset] + bytes([-sum(table) & 0xFF]) + table[offset + 1 :]
