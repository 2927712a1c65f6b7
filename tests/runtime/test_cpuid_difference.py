"""Which features a guest knows that this processor lacks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmcell_runtime.kvm.cpuid import CpuidEntry
from vmcell_runtime.kvm.cpuid_difference import _FEATURE_REGISTERS, missing_features

VENDOR = CpuidEntry(0, 0, 0, 0x0D, 0x756E6547, 0x6C65746E, 0x49656E69)
WORDS = st.integers(0, 2**32 - 1)


def entry(function: int, subleaf: int = 0, **registers: int) -> CpuidEntry:
    zeros = dict.fromkeys(("eax", "ebx", "ecx", "edx"), 0)
    return CpuidEntry(function=function, subleaf=subleaf, flags=0, **{**zeros, **registers})


def test_the_same_processor_lacks_nothing() -> None:
    known = [VENDOR, entry(1, ecx=0xFFFFFFFF, edx=0xFFFFFFFF)]
    assert missing_features(known, known) == []
    assert missing_features([], []) == []


@given(st.sampled_from(_FEATURE_REGISTERS), WORDS, WORDS)
def test_every_bit_that_was_shown_must_be_there(
    place: tuple[int, int, str], known: int, here: int
) -> None:
    function, subleaf, register = place
    found = missing_features(
        [VENDOR, entry(function, subleaf, **{register: known})],
        [VENDOR, entry(function, subleaf, **{register: here})],
    )
    mirrors = {(0x1, 0, "ecx"): 27, (0x7, 0, "ecx"): 4}  # of CR4
    assert found == [
        f"leaf {function:#x}.{subleaf} {register} bit {bit}"
        for bit in range(32)
        if known >> bit & 1 and not here >> bit & 1 and bit != mirrors.get(place)
    ]


def test_a_leaf_that_is_not_there_has_no_bits() -> None:
    assert missing_features([VENDOR, entry(7, 1, eax=1 << 4)], [VENDOR]) == ["leaf 0x7.1 eax bit 4"]
    assert missing_features([VENDOR], [VENDOR, entry(7, 1, eax=1 << 4)]) == []


def test_numbers_that_are_no_features_play_no_part() -> None:
    known = [VENDOR, entry(1, eax=0x906EA, ebx=0x100800), entry(0x80000008, eax=0x3027)]
    here = [VENDOR, entry(1, eax=0x50654, ebx=0x200800), entry(0x80000008, eax=0x302E)]
    assert missing_features(known, here) == []


def test_another_vendor_is_named() -> None:
    amd = VENDOR._replace(ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163)
    assert missing_features([VENDOR], [amd]) == ["vendor 'GenuineIntel' (here 'AuthenticAMD')"]
    hostile = VENDOR._replace(ebx=0xFFFFFFFF)
    [found] = missing_features([hostile], [VENDOR])
    assert found.startswith("vendor ")


def test_fewer_bits_of_physical_address_are_named() -> None:
    wide, narrow = entry(0x80000008, eax=0x3030), entry(0x80000008, eax=0x302E)
    assert missing_features([VENDOR, wide], [VENDOR, narrow]) == [
        "48 bits of physical address (here 46)"
    ]
    assert missing_features([VENDOR, narrow], [VENDOR, wide]) == []
