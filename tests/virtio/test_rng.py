"""The entropy device, and through it the plain life of any device."""

from __future__ import annotations

from guest_driver import Plug

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.rng import MAX_REQUEST_BYTES, Rng


def test_fills_every_piece(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Rng(memory))
    driver.start()
    queue = driver.queues[0]
    queue.offer(writable=[8, 64])
    queue.offer(writable=[4096])
    driver.kick(0)
    done = queue.collect()
    assert [written for _, written in done] == [72, 4096]
    first, second = (queue.contents(buffer) for buffer, _ in done)
    assert len(set(first)) > 16
    assert len(set(second)) > 200
    assert driver.irq.count == 1
    assert driver.get(0x60) == 1


def test_never_makes_more_than_64_kib(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Rng(memory))
    driver.start()
    driver.queues[0].offer(writable=[MAX_REQUEST_BYTES])
    driver.kick(0)
    assert driver.queues[0].collect()[0][1] == MAX_REQUEST_BYTES
    driver.queues[0].offer(writable=[MAX_REQUEST_BYTES, 1])
    driver.kick(0)
    assert driver.needs_reset
    assert not driver.queues[0].collect()


def test_buffer_outside_ram_stops_the_device_alone(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Rng(memory))
    driver.start()
    end = memory.ram_bytes
    driver.queues[0].offer_spans(writable=[(end - 8, 8)])
    driver.kick(0)
    assert driver.queues[0].collect()[0][1] == 8
    driver.queues[0].offer_spans(writable=[(end - 8, 9)])
    driver.kick(0)
    assert driver.needs_reset
    assert driver.get(0x60) & 2
    assert len(driver.reports) == 1
    assert "not inside one RAM slot" in driver.reports[0]


def test_works_again_after_reset(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Rng(memory))
    driver.start()
    driver.queues[0].offer_spans(writable=[(1 << 40, 8)])
    driver.kick(0)
    assert driver.needs_reset
    driver.start()
    assert not driver.needs_reset
    driver.queues[0].offer(writable=[16])
    driver.kick(0)
    assert driver.queues[0].collect()[0][1] == 16


def test_guest_that_breaks_rules_forever_does_not_flood_the_log(
    memory: GuestMemory, plug: Plug
) -> None:
    driver = plug(Rng(memory))
    for _ in range(30):
        driver.start()
        driver.queues[0].offer_spans(writable=[(1 << 40, 8)])
        driver.kick(0)
        assert driver.needs_reset
    assert len(driver.reports) == 10
