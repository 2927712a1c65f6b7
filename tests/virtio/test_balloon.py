"""The balloon: what leaves the host, its configuration, and page numbers nobody trusts."""

from __future__ import annotations

import struct

import pytest
from guest_driver import RAM_BYTES, GuestDriver, Plug
from hypothesis import given
from hypothesis import strategies as st
from turning_loop import TurningLoop

from vmcell_protos.errors import CallerError
from vmcell_runtime.memory import PAGE_BYTES, GuestMemory
from vmcell_runtime.virtio.balloon import (
    DEFLATE,
    F_DEFLATE_ON_OOM,
    F_REPORTING,
    INFLATE,
    MAX_NUMBERS_BYTES,
    REPORTING,
    Balloon,
)

FULL = b"\xff" * PAGE_BYTES
BASE_PAGE = (12 << 20) // PAGE_BYTES  # behind all the driver puts into its memory
CONFIG_WANTED, CONFIG_ACTUAL = 0x100, 0x104
MIB = 1 << 20


@pytest.fixture
def driver(memory: GuestMemory, plug: Plug) -> GuestDriver:
    driver = plug(Balloon(memory))
    driver.start()
    driver.loop.settle()
    return driver


def numbers(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def test_what_it_offers(driver: GuestDriver) -> None:
    assert driver.get(0x008) == 5
    offered = driver.offered() & ~(7 << 28) & 0xFFFF_FFFF
    assert offered == F_DEFLATE_ON_OOM | F_REPORTING
    assert driver.get(CONFIG_WANTED) == driver.get(CONFIG_ACTUAL) == driver.get(0x108) == 0


def test_inflating_frees_exactly_the_named_pages(driver: GuestDriver, memory: GuestMemory) -> None:
    pages = range(BASE_PAGE, BASE_PAGE + 10)
    named = [BASE_PAGE + n for n in (7, 1, 2, 3, 7)]
    for page in pages:
        memory.write(page * PAGE_BYTES, FULL)
    driver.queues[INFLATE].offer([numbers(*named)])
    driver.kick(INFLATE)
    assert [written for _, written in driver.queues[INFLATE].collect()] == [0]
    for page in pages:
        content = memory.read(page * PAGE_BYTES, PAGE_BYTES)
        assert content == (bytes(PAGE_BYTES) if page in named else FULL)
    assert driver.irq.count


def test_a_deflated_page_is_usable_memory(driver: GuestDriver, memory: GuestMemory) -> None:
    for queue in (INFLATE, DEFLATE):
        driver.queues[queue].offer([numbers(BASE_PAGE)])
        driver.kick(queue)
        assert len(driver.queues[queue].collect()) == 1
    memory.write(BASE_PAGE * PAGE_BYTES, FULL)
    assert memory.read(BASE_PAGE * PAGE_BYTES, PAGE_BYTES) == FULL


def test_a_report_frees_its_buffers(driver: GuestDriver, memory: GuestMemory) -> None:
    gpa = BASE_PAGE * PAGE_BYTES
    memory.write(gpa, FULL * 8)
    driver.queues[REPORTING].offer_spans(
        writable=[(gpa, 2 * PAGE_BYTES), (gpa + 4 * PAGE_BYTES, PAGE_BYTES)]
    )
    driver.kick(REPORTING)
    assert [written for _, written in driver.queues[REPORTING].collect()] == [0]
    gone = [memory.read(gpa + n * PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES) for n in range(8)]
    assert gone == [True, True, False, False, True, False, False, False]


def test_linuxs_largest_report_is_taken(plug: Plug) -> None:
    memory = GuestMemory(256 * MIB)
    driver = plug(Balloon(memory), ram=memory)
    driver.start()
    blocks = [(64 * MIB + n * 4 * MIB, 4 * MIB) for n in range(32)]
    driver.queues[REPORTING].offer_spans(writable=blocks)
    driver.kick(REPORTING)
    assert len(driver.queues[REPORTING].collect()) == 1
    driver.close()
    memory.close()


@pytest.mark.parametrize(
    "pages",
    [
        [RAM_BYTES // PAGE_BYTES],
        [BASE_PAGE, 0xFFFF_FFFF],
        [(3 << 30) // PAGE_BYTES],
        [0xD0000000 // PAGE_BYTES],
    ],
)
def test_a_page_that_is_no_ram_stops_the_balloon(driver: GuestDriver, pages: list[int]) -> None:
    driver.queues[INFLATE].offer([numbers(*pages)])
    driver.kick(INFLATE)
    assert driver.needs_reset
    assert "not inside one RAM slot" in driver.reports[0]
    driver.start()
    assert not driver.needs_reset


@pytest.mark.parametrize("length", [1, 6, MAX_NUMBERS_BYTES + 4])
def test_odd_buffers_of_numbers_stop_it(driver: GuestDriver, length: int) -> None:
    driver.queues[INFLATE].offer([bytes(length)])
    driver.kick(INFLATE)
    assert driver.needs_reset


def test_a_report_outside_ram_stops_it(driver: GuestDriver) -> None:
    driver.queues[REPORTING].offer_spans(writable=[(RAM_BYTES - PAGE_BYTES, 2 * PAGE_BYTES)])
    driver.kick(REPORTING)
    assert driver.needs_reset


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 4100), max_size=64))
def test_any_numbers_free_those_pages_or_stop_it(pages: list[int]) -> None:
    memory, loop = GuestMemory(RAM_BYTES), TurningLoop()
    driver = GuestDriver(Balloon(memory), memory, loop)
    driver.start()
    for page in range(16):
        memory.write(page * PAGE_BYTES, FULL)
    driver.queues[INFLATE].offer([numbers(*pages) or bytes(1)])
    driver.kick(INFLATE)
    legal = bool(pages) and all(page < RAM_BYTES // PAGE_BYTES for page in pages)
    # Numbers that name the rings or this very buffer are the guest's own loss.
    touched = range(0x10_0000 // PAGE_BYTES, 0x21_0000 // PAGE_BYTES)
    if not any(page in touched for page in pages):
        assert driver.needs_reset is not legal
    for page in range(16):
        content = memory.read(page * PAGE_BYTES, PAGE_BYTES)
        if page not in pages:
            assert content == FULL
        elif legal:
            assert content == bytes(PAGE_BYTES)
    driver.close()
    loop.close()
    memory.close()


def test_the_driver_hears_of_a_new_wish(memory: GuestMemory, plug: Plug) -> None:
    memory = GuestMemory(256 * MIB)
    balloon = Balloon(memory)
    driver = plug(balloon, ram=memory)
    balloon.set_wanted(5)
    assert driver.irq.count == 0, "nobody listens yet"
    driver.start()
    assert driver.get(CONFIG_WANTED) == 5 * 256
    generation = driver.get(0x0FC)
    balloon.set_wanted(192)
    assert driver.get(0x060) == 2
    assert driver.irq.count == 1
    assert driver.get(0x0FC) == generation + 1
    assert driver.get(CONFIG_WANTED) == 192 * 256
    assert balloon.wanted_mib == 192
    with pytest.raises(CallerError, match="193 of 256 MiB; take at most 192"):
        balloon.set_wanted(193)
    driver.close()
    memory.close()


def test_a_small_guest_gives_nothing(memory: GuestMemory) -> None:
    balloon = Balloon(memory)
    balloon.set_wanted(0)
    with pytest.raises(CallerError, match="at most 0"):
        balloon.set_wanted(1)


def test_what_the_guest_says_it_gave(driver: GuestDriver) -> None:
    balloon = driver.device
    assert isinstance(balloon, Balloon)
    driver.set(CONFIG_ACTUAL, 3 * 256 + 255)
    assert driver.get(CONFIG_ACTUAL) == 3 * 256 + 255
    assert balloon.actual_mib == 3
    driver.set(CONFIG_ACTUAL, 0xFFFF_FFFF)
    assert balloon.actual_mib == RAM_BYTES >> 20, "never more than it has"
    driver.set(0x70, 0)
    assert balloon.actual_mib == 0


def test_no_other_field_can_be_written(driver: GuestDriver) -> None:
    before = driver.transport.ignored_accesses
    for offset, size in ((0x100, 4), (0x104, 2), (0x104, 8), (0x105, 4), (0x108, 4), (0x106, 1)):
        driver.transport.write(offset, size, 0)
    assert driver.transport.ignored_accesses - before == 6
    assert driver.get(CONFIG_WANTED) == 0


def test_a_driver_without_reporting_has_two_queues(driver: GuestDriver) -> None:
    driver.negotiate(F_DEFLATE_ON_OOM)
    for index in (INFLATE, DEFLATE):
        driver.set(0x30, index)
        driver.place_queue(driver.queues[index].layout)
        driver.memory.write(driver.queues[index].gpa, bytes(0x4000))
    driver.set(0x70, 15)
    assert driver.get(0x70) == 15
    driver.kick(REPORTING)
    assert not driver.needs_reset


def test_a_driver_with_reporting_sets_up_its_queue(driver: GuestDriver) -> None:
    driver.negotiate(F_REPORTING)
    for index in (INFLATE, DEFLATE):
        driver.set(0x30, index)
        driver.place_queue(driver.queues[index].layout)
    driver.set(0x70, 15)
    assert driver.needs_reset
