"""What this processor lacks of the one a guest has been started on; no I/O.

A guest looks at CPUID once and uses what it found for ever, so each feature it was shown must be
there wherever it goes on. More features do no harm: it is shown the CPUID it knows. Leaves and
registers: Intel SDM vol. 2 CPUID, AMD APM vol. 3 appendix E, Linux virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmcell_runtime.kvm.cpuid import CpuidEntry

# Every bit of these registers stands for something that is there or not.
_FEATURE_REGISTERS = (
    *((0x1, 0, "ecx"), (0x1, 0, "edx")),
    (0x6, 0, "eax"),
    *((0x7, 0, "ebx"), (0x7, 0, "ecx"), (0x7, 0, "edx")),
    *((0x7, 1, "eax"), (0x7, 1, "edx"), (0x7, 2, "edx")),
    *((0xD, 0, "eax"), (0xD, 0, "edx"), (0xD, 1, "eax")),
    *((0x80000001, 0, "ecx"), (0x80000001, 0, "edx")),
    (0x80000007, 0, "edx"),
    (0x80000008, 0, "ebx"),
    (0x80000021, 0, "eax"),
    (0x40000001, 0, "eax"),
)
_OSXSAVE = 1 << 27  # of leaf 1 ECX: a mirror of CR4, and KVM fills it in
_OSPKE = 1 << 4  # of leaf 7 ECX, likewise


def missing_features(known: Iterable[CpuidEntry], here: Iterable[CpuidEntry]) -> list[str]:
    """Each as "leaf 0x7.0 ebx bit 16", and the vendor if it is another; empty: go on here."""
    before = {(entry.function, entry.subleaf): entry for entry in known}
    now = {(entry.function, entry.subleaf): entry for entry in here}
    found = []
    if _vendor(before) != _vendor(now):
        found.append(f"vendor {_vendor(before)!r} (here {_vendor(now)!r})")
    wide, narrow = _physical_bits(before), _physical_bits(now)
    if narrow < wide:
        found.append(f"{wide} bits of physical address (here {narrow})")
    for function, subleaf, register in _FEATURE_REGISTERS:
        wanted = _register(before, function, subleaf, register)
        lacking = wanted & ~_register(now, function, subleaf, register)
        if register == "ecx" and function in (0x1, 0x7):
            lacking &= ~(_OSXSAVE if function == 0x1 else _OSPKE)
        found += [
            f"leaf {function:#x}.{subleaf} {register} bit {bit}"
            for bit in range(32)
            if lacking >> bit & 1
        ]
    return found


def _register(
    entries: dict[tuple[int, int], CpuidEntry], function: int, subleaf: int, register: str
) -> int:
    entry = entries.get((function, subleaf))
    return getattr(entry, register) if entry is not None else 0


def _physical_bits(entries: dict[tuple[int, int], CpuidEntry]) -> int:
    """What a page table may use for an address; the bits beyond are reserved and fault."""
    return _register(entries, 0x80000008, 0, "eax") & 0xFF


def _vendor(entries: dict[tuple[int, int], CpuidEntry]) -> str:
    entry = entries.get((0, 0))
    if entry is None:
        return ""
    words = (entry.ebx, entry.edx, entry.ecx)
    return b"".join(word.to_bytes(4, "little") for word in words).decode("ascii", "replace")
