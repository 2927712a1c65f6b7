"""A transport saved and loaded by another: registers, rings, interrupts and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guest_driver import EVENT_IDX, RAM_BYTES, VERSION_1, GuestDriver, Plug
from hypothesis import given, settings
from hypothesis import strategies as st
from turning_loop import TurningLoop

from vmcell_protos.errors import CallerError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.device import Activation, PlainDevice, VirtioDevice
from vmcell_runtime.virtio.queue import Chain
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.saved import QueueState, TransportState
from vmcell_runtime.virtio.vsock.device import Vsock

RUNNING = 15
QUEUE_READY = 0x44


class Keeper(PlainDevice):
    """Takes each buffer, and gives back the oldest ones it has when it is told to."""

    device_id = 42
    features = 0
    queue_sizes = (8, 8)
    max_chain_bytes = 4096
    config = b"as it is"

    def __init__(self) -> None:
        self.activation: Activation | None = None
        self.kept: list[Chain] = []
        self.restored = 0
        self.closed = False

    def activate(self, activation: Activation) -> None:
        self.activation = activation

    def process(self, queue_index: int) -> bool:
        assert self.activation is not None
        return self.activation.queues[queue_index].drain(self.kept.append)

    def give_back(self, count: int) -> None:
        assert self.activation is not None
        [queue, _] = self.activation.queues
        for chain in self.kept[:count]:
            queue.complete(chain.head, 0)
        del self.kept[:count]
        self.activation.link.signal(queue)

    def reset(self) -> None:
        self.activation = None
        self.kept.clear()

    def close(self) -> None:
        self.closed = True

    def tell_restored(self) -> None:
        self.restored += 1


@pytest.fixture
def device() -> Keeper:
    return Keeper()


@pytest.fixture
def driver(device: Keeper, plug: Plug) -> GuestDriver:
    return plug(device)


@pytest.fixture
def successor(plug: Plug) -> GuestDriver:
    return plug(Keeper())


def load(successor: GuestDriver, state: TransportState) -> Keeper:
    successor.transport.load(state)
    assert isinstance(successor.device, Keeper)
    return successor.device


def test_buffers_in_flight_are_taken_again(
    driver: GuestDriver, device: Keeper, successor: GuestDriver
) -> None:
    driver.start()
    [ring, _] = driver.queues
    heads = [ring.offer(writable=[64]).head for _ in range(5)]
    driver.kick(0)
    device.give_back(2)
    assert device.activation is not None
    assert device.activation.queues[0].position == (2, 2)
    state = driver.transport.save()
    assert (state.queues[0].next_avail, state.queues[0].used_index) == (2, 2)
    keeper = load(successor, state)
    assert keeper.restored == 1
    successor.loop.settle()  # notified, for what was offered meanwhile
    assert [chain.head for chain in keeper.kept] == heads[2:]
    keeper.give_back(3)
    assert [buffer.head for buffer, _ in ring.collect()] == heads


def test_positions_go_round(driver: GuestDriver, device: Keeper, successor: GuestDriver) -> None:
    driver.start()
    [ring, _] = driver.queues
    for _ in range(0x10000 // 8 + 1):
        for _ in range(8):
            ring.offer(writable=[64])
        driver.kick(0)
        device.give_back(8)
        ring.collect()
        ring.next_buffer_gpa = ring.buffers_gpa
        if device.activation and device.activation.queues[0].position == (0xFFF8, 0xFFF8):
            break
    for _ in range(8):
        ring.offer(writable=[64])
    driver.kick(0)
    assert device.activation is not None
    assert device.activation.queues[0].position == (0xFFF8, 0xFFF8), "eight are in flight"
    keeper = load(successor, driver.transport.save())
    successor.loop.settle()
    assert len(keeper.kept) == 8
    keeper.give_back(8)
    assert len(ring.collect()) == 8


def test_every_register_is_as_it_was(driver: GuestDriver, successor: GuestDriver) -> None:
    driver.start()
    driver.set(0x30, 1)
    driver.set(0x14, 1)
    load(successor, driver.transport.save())
    for offset in (0x08, 0x10, 0x34, QUEUE_READY, 0x70, 0xFC):
        assert successor.get(offset) == driver.get(offset)
    assert successor.transport.save() == driver.transport.save()


def test_a_driver_in_the_middle_of_its_walk_goes_on(
    driver: GuestDriver, successor: GuestDriver
) -> None:
    driver.negotiate()
    driver.set(0x30, 1)
    driver.set(0x38, 4)
    keeper = load(successor, driver.transport.save())
    assert keeper.activation is None
    assert keeper.restored == 0
    assert successor.get(0x70) == 11
    for index in (0, 1):
        successor.set(0x30, index)
        gpa = 0x10_0000 + 0x8000 * index
        for offset, where in ((0x80, gpa), (0x90, gpa + 0x1000), (0xA0, gpa + 0x2000)):
            successor.set(offset, where)
        if not index:
            successor.set(0x38, 8)
        successor.set(QUEUE_READY, 1)
    successor.set(0x70, RUNNING)
    assert successor.get(0x70) == RUNNING
    assert keeper.activation is not None
    assert [queue.layout.size for queue in keeper.activation.queues] == [8, 4]


def test_an_interrupt_the_guest_has_not_seen_is_raised_again(
    driver: GuestDriver, device: Keeper, successor: GuestDriver
) -> None:
    driver.start()
    driver.queues[0].offer(writable=[64])
    driver.kick(0)
    device.give_back(1)
    load(successor, driver.transport.save())
    assert successor.get(0x60) == 1
    assert successor.irq.count == 1
    driver.set(0x64, 1)
    load(successor, driver.transport.save())
    assert successor.irq.count == 1, "seen and acknowledged"


def test_a_device_whose_driver_has_taken_a_queue_stays_stopped(
    driver: GuestDriver, successor: GuestDriver
) -> None:
    driver.start()
    driver.set(0x30, 1)
    driver.set(QUEUE_READY, 0)
    keeper = load(successor, driver.transport.save())
    assert keeper.activation is None
    assert successor.get(0x70) == RUNNING
    successor.start()
    assert keeper.activation is not None


def test_a_device_that_needs_a_reset_still_does(
    driver: GuestDriver, successor: GuestDriver
) -> None:
    driver.start()
    driver.memory.store16(driver.queues[0].layout.driver_gpa + 2, 100)
    driver.kick(0)
    assert driver.needs_reset
    keeper = load(successor, driver.transport.save())
    assert successor.needs_reset
    assert keeper.activation is None


def test_what_cannot_have_been_a_predecessor_is_refused(
    driver: GuestDriver, successor: GuestDriver, plug: Plug, memory: GuestMemory
) -> None:
    driver.start()
    state = driver.transport.save()
    row = state.queues[0]
    rows = state.queues[1:]
    for changed, words in (
        (state._replace(device_id=2), "a device of kind 2"),
        (state._replace(queues=rows), "with 1 queues"),
        (state._replace(driver_features=1 << 60), "uses features 0x1000000000000000"),
        (state._replace(own={"more": 1}), "remembers .'more'"),
        (state._replace(queues=(row._replace(size=3), *rows)), "not a power of two"),
        (state._replace(queues=(row._replace(size=1 << 31), *rows)), "not a power of two"),
        (state._replace(queues=(row._replace(device_gpa=1 << 63), *rows)), "inside one RAM slot"),
        (state._replace(queues=(row._replace(driver_gpa=row.descriptor_gpa), *rows)), "overlap"),
    ):
        with pytest.raises(CallerError, match=words):
            plug(Keeper()).transport.load(changed)
    rng = plug(Rng(memory)).transport.save()
    with pytest.raises(CallerError, match="a device of kind 4"):
        successor.transport.load(rng)


def test_a_balloon_remembers_its_size(plug: Plug, memory: GuestMemory) -> None:
    old, new = Balloon(memory), Balloon(memory)
    driver = plug(old)
    driver.start()
    state = driver.transport.save()
    plug(new).transport.load(state._replace(own={"wanted_pages": 512, "actual_pages": 1 << 31}))
    assert new.wanted_mib == 2
    assert new.actual_mib == memory.ram_bytes >> 20
    most = memory.ram_bytes // 4096
    for own in ({}, {"wanted_pages": most + 1, "actual_pages": 0}, {"wanted_pages": -1}):
        with pytest.raises(CallerError, match="cannot be"):
            plug(Balloon(memory)).transport.load(state._replace(own=own))


WORDS = st.sampled_from((0, 1, 3, 8, 15, 16, 256, 1 << 16, 1 << 31)) | st.integers(0, 2**32 - 1)
GPAS = st.sampled_from((0, 0x10_0000, 0x10_1000, RAM_BYTES - 4, 1 << 32, 2**64 - 1))
HALVES = st.integers(0, 2**16 - 1)
QUEUES = st.builds(
    QueueState, WORDS, st.sampled_from((True, True, False)), GPAS, GPAS, GPAS, HALVES, HALVES
)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_whatever_was_saved_a_device_takes_or_refuses(data: st.DataObject) -> None:
    """And what it took it works with: at the worst it needs a reset."""
    memory, loop = GuestMemory(RAM_BYTES), TurningLoop()
    kinds: list[Callable[[], VirtioDevice]] = [
        Keeper,
        lambda: Rng(memory),
        lambda: Balloon(memory),
        lambda: Vsock(memory, loop, 3),
    ]
    make = data.draw(st.sampled_from(kinds))
    old, new = GuestDriver(make(), memory, loop), GuestDriver(make(), memory, loop)
    try:
        old.start()
        state = old.transport.save()
        fields = {
            "status": st.sampled_from((0, 1, 3, 11, 15, 15, 15, 79, 143, 255)),
            "driver_features": st.sampled_from((0, VERSION_1, VERSION_1 | EVENT_IDX, 1 << 63)),
            "queue_select": WORDS,
            "driver_features_select": WORDS,
            "device_features_select": WORDS,
            "interrupt_status": WORDS,
            "config_generation": WORDS,
            "queues": st.tuples(*[st.just(row) | QUEUES for row in state.queues]),
            "own": st.just(state.own)
            | st.dictionaries(
                st.sampled_from(("wanted_pages", "actual_pages", "x")), st.integers(-1, 2**64 - 1)
            ),
        }
        names = data.draw(st.sets(st.sampled_from(sorted(fields))))
        changed = state._replace(**{name: data.draw(fields[name]) for name in sorted(names)})
        try:
            new.transport.load(changed)
        except CallerError:
            return
        loop.settle()
        for offset in range(0, 0x110, 4):
            new.get(offset)
        new.start()
        assert new.get(0x70) == RUNNING
        loop.settle()
    finally:
        old.close()
        new.close()
        loop.close()
        memory.close()
