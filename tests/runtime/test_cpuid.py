"""The CPUID template: what is hidden, what is added, and the topology of each vCPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_runtime.kvm.cpuid import (
    CpuidEntry,
    decode_cpuid,
    encode_cpuid,
    guest_cpuid,
    physical_address_bits,
    without_cpu_number,
)

ALL = 0xFFFF_FFFF
SUPPORTED = [
    CpuidEntry(0x0, 0, 0, 0x1F, 1, 2, 3),
    CpuidEntry(0x1, 0, 0, 0xA10F11, 0x55 << 24 | 0x5500 | 0x80, ALL & ~(1 << 31), ALL),
    CpuidEntry(0x4, 0, 1, 0xFC01C121, 1, 2, 3),
    CpuidEntry(0x4, 3, 1, 0xFC01C163, 1, 2, 3),
    CpuidEntry(0xA, 0, 0, 7, 7, 7, 7),
    CpuidEntry(0xB, 0, 1, 9, 9, 9, 9),
    CpuidEntry(0x1F, 0, 1, 9, 9, 9, 9),
    CpuidEntry(0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
    CpuidEntry(0x40000001, 0, 0, ALL, 0, 0, 0),
    CpuidEntry(0x80000001, 0, 0, 0, 0, ALL, ALL),
    CpuidEntry(0x80000008, 0, 0, 0x3028, 0, ALL, 0),
    CpuidEntry(0x8000000A, 0, 0, 1, 2, 3, 4),
    CpuidEntry(0x8000001D, 2, 1, 0x143, 1, 2, 3),
    CpuidEntry(0x8000001E, 0, 0, 5, 0x105, 7, 0),
]


def leaves(
    vcpu: int, count: int, *, tsc_deadline: bool = True
) -> dict[tuple[int, int], CpuidEntry]:
    entries = guest_cpuid(SUPPORTED, vcpu, count, tsc_deadline=tsc_deadline)
    table = {(entry.function, entry.subleaf): entry for entry in entries}
    assert len(table) == len(entries), "no leaf twice"
    return table


def test_nested_virtualisation_is_never_offered() -> None:
    table = leaves(0, 1)
    assert not table[1, 0].ecx & 1 << 5, "VMX"
    assert not table[0x80000001, 0].ecx & 1 << 2, "SVM"
    assert (0x8000000A, 0) not in table


def test_the_guest_knows_its_hypervisor() -> None:
    table = leaves(0, 1)
    assert table[1, 0].ecx & 1 << 31
    assert table[0x40000000, 0] == SUPPORTED[7]
    assert table[0x40000001, 0].eax & 1 << 3, "its clock"
    assert not table[0x40000001, 0].eax & (1 << 4 | 1 << 10 | 1 << 14), "asynchronous page faults"


@pytest.mark.parametrize("offered", [True, False])
def test_tsc_deadline_follows_the_hosts_capability(offered: bool) -> None:
    assert bool(leaves(0, 1, tsc_deadline=offered)[1, 0].ecx & 1 << 24) is offered


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_apic_ids_agree_in_every_leaf(place: tuple[int, int]) -> None:
    vcpu, count = place
    table = leaves(vcpu, count)
    assert table[1, 0].ebx >> 24 == vcpu
    assert table[1, 0].ebx & 0xFFFF == 0x5580, "brand and CLFLUSH size stay"
    assert bool(table[1, 0].edx & 1 << 28) is (count > 1)
    assert [table[0xB, n].edx for n in range(3)] == [vcpu] * 3
    assert table[0xB, 1].ebx == count
    assert vcpu >> table[0xB, 1].eax == 0, "all in one package"
    assert table[0x8000001E, 0].eax == vcpu
    assert table[0x80000008, 0].ecx & 0xFF == count - 1
    assert (0x1F, 0) not in table


def test_caches_are_shared_as_the_topology_says() -> None:
    table = leaves(0, 6)
    assert table[4, 0].eax == 0x121 | 5 << 26, "level 1: one core of six"
    assert table[4, 3].eax == 0x163 | 5 << 14 | 5 << 26, "level 3: all six"
    assert table[0x8000001D, 2].eax == 0x143


def test_there_are_no_performance_counters() -> None:
    table = leaves(0, 1)
    assert table[0xA, 0][3:] == (0, 0, 0, 0)
    assert not table[0x80000001, 0].ecx & 1 << 23


def test_old_processors_get_no_topology_leaf() -> None:
    old = [CpuidEntry(0, 0, 0, 0xA, 1, 2, 3)]
    assert guest_cpuid(old, 0, 1, tsc_deadline=True) == old


def test_address_bits() -> None:
    assert physical_address_bits(SUPPORTED) == 0x28
    assert physical_address_bits([]) == 36


words = st.integers(0, ALL)


@given(st.lists(st.builds(CpuidEntry, words, words, words, words, words, words, words)))
def test_encoding_goes_round(entries: list[CpuidEntry]) -> None:
    assert decode_cpuid(encode_cpuid(entries)) == entries


def test_what_depends_on_the_cpu_that_was_asked_is_left_out() -> None:
    """Two CPUs of one host give the same then, and guests see what they saw before."""
    other = {
        0x1: {"ebx": 0x77 << 24 | 0x5500 | 0x80},
        0xB: {"edx": 5},
        0x1F: {"edx": 5},
        0x8000001E: {"eax": 9, "ebx": 0x109, "ecx": 1},
    }
    elsewhere = [entry._replace(**other.get(entry.function, {})) for entry in SUPPORTED]
    assert elsewhere != SUPPORTED
    plain = without_cpu_number(SUPPORTED)
    assert without_cpu_number(elsewhere) == plain
    for vcpu in range(2):
        shown = guest_cpuid(SUPPORTED, vcpu, 2, tsc_deadline=True)
        assert guest_cpuid(plain, vcpu, 2, tsc_deadline=True) == shown
