"""The image window: where it is, and flush."""

from __future__ import annotations

import struct

from fake_memory import FlippingMemory
from guest_driver import Plug

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.pmem import Pmem

GPA = 4 << 30
LENGTH = 190 << 20


def test_configuration_names_the_window(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Pmem(memory, GPA, LENGTH))
    assert driver.get(0x008) == 27
    words = [driver.get(0x100 + 4 * n) for n in range(4)]
    assert words[0] | words[1] << 32 == GPA
    assert words[2] | words[3] << 32 == LENGTH
    assert driver.get(0x110) == 0


def test_flush_succeeds_and_other_requests_fail(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Pmem(memory, GPA, LENGTH))
    driver.start()
    queue = driver.queues[0]
    for kind in (0, 1, 0xFFFF_FFFF):
        queue.offer([struct.pack("<I", kind)], [4])
    driver.kick(0)
    done = queue.collect()
    assert [written for _, written in done] == [4, 4, 4]
    results = [struct.unpack("<I", queue.contents(buffer))[0] for buffer, _ in done]
    assert results == [0, 1, 1]


def test_request_without_room_for_an_answer_stops_it(memory: GuestMemory, plug: Plug) -> None:
    driver = plug(Pmem(memory, GPA, LENGTH))
    driver.start()
    driver.queues[0].offer([bytes(4)], [3])
    driver.kick(0)
    assert driver.needs_reset


def test_request_is_read_once(flipping_memory: FlippingMemory, plug: Plug) -> None:
    driver = plug(Pmem(flipping_memory, GPA, LENGTH), ram=flipping_memory)
    driver.start()
    flipping_memory.flip = True
    buffer = driver.queues[0].offer([struct.pack("<I", 0)], [4])
    driver.kick(0)
    assert flipping_memory.second_reads == 0
    flipping_memory.flip = False
    assert driver.queues[0].contents(buffer) == bytes(4)
