"""The register window: the walk of a driver, and random walks of a guest that is none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from guest_driver import EVENT_IDX, RAM_BYTES, VERSION_1, GuestDriver, Plug
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from turning_loop import TurningLoop

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import status
from vmcell_runtime.virtio.device import Activation, PlainDevice
from vmcell_runtime.virtio.queue import RingLayout
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.window import SpareWindow

DEVICE_FEATURE = 1 << 5
RING_REGISTERS = (0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4)


class Recorder(PlainDevice):
    """A device with two queues that notes what its transport tells it."""

    device_id = 42
    features = DEVICE_FEATURE | 1 << 28
    queue_sizes = (8, 16)
    max_chain_bytes = 4096
    config = bytes(range(1, 13))

    def __init__(self) -> None:
        self.activation: Activation | None = None
        self.events: list[str] = []
        self.work: Callable[[int], bool] = lambda _index: False

    def activate(self, activation: Activation) -> None:
        assert self.activation is None
        self.activation = activation
        self.events.append("activate")

    def process(self, queue_index: int) -> bool:
        assert self.activation is not None
        self.events.append(f"process {queue_index}")
        return self.work(queue_index)

    def reset(self) -> None:
        self.activation = None
        self.events.append("reset")

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def driver(device: Recorder, plug: Plug) -> GuestDriver:
    return plug(device)


def offer(driver: GuestDriver, index: int) -> None:
    """A buffer and the notification that there is one."""
    driver.queues[index].offer([b"x"])
    driver.kick(index)


def test_identity(driver: GuestDriver) -> None:
    assert driver.get(0x000) == 0x74726976
    assert driver.get(0x004) == 2
    assert driver.get(0x008) == 42
    assert driver.get(0x00C) != 0
    assert driver.offered() == DEVICE_FEATURE | 1 << 28 | EVENT_IDX | VERSION_1
    driver.set(0x14, 2)
    assert driver.get(0x10) == 0


def test_configuration_space_by_every_width(driver: GuestDriver) -> None:
    read = driver.transport.read
    assert [read(0x100 + n, 1) for n in range(14)] == [*range(1, 13), 0, 0]
    assert read(0x100, 2) == 0x0201
    assert read(0x104, 8) == 0x0C0B0A0908070605
    assert read(0x10A, 4) == 0x0C0B
    assert read(0xFFC, 4) == 0
    driver.transport.write(0x100, 4, 0xFFFF_FFFF)
    assert read(0x100, 4) == 0x04030201


def test_no_shared_memory_regions(driver: GuestDriver) -> None:
    driver.set(0xAC, 0)
    assert [driver.get(offset) for offset in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4


def test_queues_that_do_not_exist(driver: GuestDriver) -> None:
    driver.negotiate()
    sizes = []
    for index in (0, 1, 2, 0xFFFF_FFFF):
        driver.set(0x30, index)
        sizes.append(driver.get(0x34))
        driver.set(0x44, 1)
    assert sizes == [8, 16, 0, 0]
    assert driver.get(0x44) == 0


def test_the_walk(driver: GuestDriver, device: Recorder) -> None:
    driver.start(DEVICE_FEATURE)
    assert driver.get(0x70) == 15
    assert device.activation is not None
    assert device.activation.features == DEVICE_FEATURE | VERSION_1
    assert [queue.layout.size for queue in device.activation.queues] == [8, 16]
    driver.loop.settle()
    assert device.events == ["reset", "activate", "process 0", "process 1"]


@pytest.mark.parametrize("features", [0, DEVICE_FEATURE])
def test_version_1_is_demanded(driver: GuestDriver, features: int) -> None:
    driver.set(0x70, 1)
    driver.set(0x70, 3)
    driver.set(0x20, features)
    driver.set(0x70, 11)
    assert driver.get(0x70) == 3


def test_features_not_offered_are_refused(driver: GuestDriver) -> None:
    driver.negotiate(1 << 7)
    assert driver.get(0x70) == 3


def test_features_are_fixed_once_accepted(driver: GuestDriver, device: Recorder) -> None:
    driver.start(DEVICE_FEATURE)
    driver.set(0x24, 0)
    driver.set(0x20, 1 << 28)
    assert device.activation is not None
    assert device.activation.features == DEVICE_FEATURE | VERSION_1


def test_queues_are_frozen_at_driver_ok(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    assert device.activation is not None
    before = [queue.layout for queue in device.activation.queues]
    driver.set(0x30, 0)
    for register in RING_REGISTERS:
        driver.set(register, 0xFFFF_F001)
    assert [queue.layout for queue in device.activation.queues] == before
    assert driver.get(0x44) == 1


@pytest.mark.parametrize(
    "layout",
    [
        RingLayout(3, 0x10000, 0x20000, 0x30000),
        RingLayout(32, 0x10000, 0x20000, 0x30000),
        RingLayout(8, 0x10001, 0x20000, 0x30000),
        RingLayout(8, RAM_BYTES, 0x20000, 0x30000),
        RingLayout(8, 0x10000, 0x10000, 0x30000),
    ],
)
def test_unusable_queue_needs_reset(
    driver: GuestDriver, device: Recorder, layout: RingLayout
) -> None:
    driver.negotiate()
    driver.set(0x30, 0)
    driver.place_queue(layout)
    driver.set(0x30, 1)
    driver.place_queue(RingLayout(16, 0x40000, 0x50000, 0x60000))
    driver.set(0x70, 15)
    assert driver.needs_reset
    assert device.activation is None
    assert driver.irq.count == 1
    assert driver.get(0x60) == 2
    driver.start()
    assert driver.get(0x70) == 15


def test_a_queue_taken_away_stops_the_device(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    driver.loop.settle()
    assert device.activation is not None
    link = device.activation.link
    driver.set(0x30, 1)
    driver.set(0x44, 0)
    assert driver.get(0x44) == 0
    assert (driver.get(0x70), device.activation) == (15, None)
    assert not link.run(lambda: None)
    events = list(device.events)
    driver.kick(0)
    driver.set(0x44, 1)
    driver.set(0x44, 0)
    assert driver.get(0x44) == 0
    assert device.events == events == [*events[:-1], "reset"]
    driver.start()
    assert device.activation is not None


def test_queue_not_ready_needs_reset(driver: GuestDriver) -> None:
    driver.negotiate()
    driver.set(0x70, 15)
    assert driver.needs_reset


def test_interrupt_status_is_acknowledged_bit_by_bit(driver: GuestDriver) -> None:
    driver.start()
    driver.transport.interrupt(1)
    driver.transport.interrupt(2)
    assert driver.get(0x60) == 3
    driver.set(0x64, 1)
    assert driver.get(0x60) == 2
    driver.set(0x64, 0xFFFF_FFFF)
    assert driver.get(0x60) == 0
    assert driver.irq.count == 2


def test_with_the_kernel_raising_interrupts_a_handler_always_finds_a_reason(plug: Plug) -> None:
    device = Recorder()
    device.in_kernel = True
    driver = plug(device)
    assert driver.get(0x60) == 1
    driver.set(0x64, 1)
    assert driver.get(0x60) == 1


def test_guest_error_stops_this_device_and_says_so_once(
    driver: GuestDriver, device: Recorder
) -> None:
    driver.start()
    driver.loop.settle()

    def break_down(_index: int) -> bool:
        raise GuestError("the ring is nonsense")

    device.work = break_down
    offer(driver, 0)
    assert driver.needs_reset
    assert device.events[-1] == "reset"
    assert driver.reports == ["virtio device 42 stopped: the ring is nonsense"]
    events = list(device.events)
    offer(driver, 0)
    assert device.events == events
    driver.set(0x70, 15)
    assert driver.get(0x70) == 15 | 64


def test_other_exceptions_leave_the_loop(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    driver.loop.settle()
    device.work = lambda _index: bool(1 // 0)
    with pytest.raises(ZeroDivisionError):
        offer(driver, 0)


def test_unfinished_work_goes_on_at_the_next_turn(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    driver.loop.settle()
    left = [3]

    def work(_index: int) -> bool:
        left[0] -= 1
        return left[0] > 0

    device.work = work
    offer(driver, 1)
    assert left == [0]
    assert device.events[-3:] == ["process 1"] * 3


def test_one_notification_is_for_all_queues_with_news(
    driver: GuestDriver, device: Recorder
) -> None:
    driver.start()
    driver.loop.settle()
    device.events.clear()
    driver.kick(0)
    assert device.events == [], "nothing is offered"
    driver.queues[0].offer([b"x"])
    driver.queues[1].offer([b"x"])
    driver.kick(1)
    assert device.events == ["process 0", "process 1"]


def test_a_queue_that_is_never_done_leaves_the_other_its_turn(
    driver: GuestDriver, device: Recorder
) -> None:
    driver.start()
    driver.loop.settle()
    device.events.clear()
    turns = iter([True] * 5)
    device.work = lambda index: index == 0 and next(turns, False)
    driver.queues[0].offer([b"x"])
    driver.queues[1].offer([b"x"])
    driver.kick(0)
    assert device.events[:4] == ["process 0", "process 1", "process 0", "process 1"]


def test_a_device_asks_for_a_queue_itself(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    driver.loop.settle()
    assert device.activation is not None
    link = device.activation.link
    device.events.clear()
    link.process_soon(1)
    driver.loop.settle()
    assert device.events == ["process 1"]
    driver.start()
    driver.loop.settle()
    device.events.clear()
    link.process_soon(1)
    driver.loop.settle()
    assert device.events == [], "that activation is over"


def test_notification_of_a_queue_that_does_not_exist(driver: GuestDriver) -> None:
    driver.start()
    for index in (2, 255, 0xFFFF_FFFF):
        driver.kick(index)
    assert not driver.needs_reset


def test_callbacks_of_an_ended_activation_are_mute(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    assert device.activation is not None
    called: list[str] = []
    old = device.activation.link
    guarded = old.guard(called.append)
    guarded("live")
    driver.start()
    guarded("dead")
    assert not old.run(lambda: called.append("dead too"))
    assert called == ["live"]


def test_reset_waits_for_the_work_in_progress(driver: GuestDriver, device: Recorder) -> None:
    """A vCPU's reset returns only once the loop's thread has left the device."""
    driver.start()
    driver.loop.settle()
    working, finish = threading.Event(), threading.Event()

    def work(_index: int) -> bool:
        working.set()
        assert finish.wait(10)
        device.events.append("worked")
        return False

    device.work = work
    driver.queues[0].offer([b"x"])
    driver.set(0x50, 0)
    loop_thread = threading.Thread(target=driver.loop.turn)
    loop_thread.start()
    assert working.wait(10)
    vcpu = threading.Thread(target=driver.set, args=(0x70, 0))
    vcpu.start()
    assert driver.get(0x60) == 0  # an interrupt handler does not wait
    finish.set()
    for thread in (loop_thread, vcpu):
        thread.join(10)
        assert not thread.is_alive()
    assert device.events[-2:] == ["worked", "reset"]


def test_close_is_idempotent_and_closes_what_it_owns(device: Recorder, driver: GuestDriver) -> None:
    fds = [fd for fd, _ in driver.transport.notifications]
    driver.transport.close()
    driver.transport.close()
    assert device.events == ["close"]
    for fd in fds:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


EMPTY = [0x74726976, 2, 0, 0x6C6C6563]


def test_an_empty_window_says_what_it_is_and_nothing_else(
    driver: GuestDriver, device: Recorder
) -> None:
    window = SpareWindow()
    assert [window.read(4 * n, 4) for n in range(4)] == EMPTY
    for offset in range(0x10, 0x200, 4):
        window.write(offset, 4, 0xFFFF_FFFF)
        assert window.read(offset, 4) == 0
    assert window.read(0, 1) == window.read(0, 8) == 0
    window.transport = driver.transport
    assert window.read(8, 4) == 42
    window.write(0x70, 4, 1)
    assert driver.get(0x70) == 1
    window.transport = None
    assert [window.read(4 * n, 4) for n in range(4)] == EMPTY


def test_a_closed_transport_is_an_empty_window(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    driver.loop.settle()
    driver.transport.interrupt(1)
    driver.transport.close()
    events = list(device.events)
    assert [driver.get(4 * n) for n in range(4)] == EMPTY
    for offset in (0x50, 0x60, 0x64, 0x70, 0x100):
        driver.set(offset, 1)
        assert driver.get(offset) == 0
    assert driver.transport.read(0x100, 1) == 0
    driver.loop.settle()
    assert device.events == events == [*events[:-1], "close"]


def test_a_driver_at_work_does_not_delay_the_close(driver: GuestDriver, device: Recorder) -> None:
    """A vCPU that walks the registers all the time, and the loop that takes the device away."""
    stop = threading.Event()

    def walk() -> None:
        while not stop.is_set():
            driver.start()
            driver.set(0x50, 0)

    device.reset = lambda: setattr(device, "activation", None)  # type: ignore[method-assign]  # quiet
    vcpu = threading.Thread(target=walk)
    vcpu.start()
    try:
        for _ in range(50):
            driver.loop.turn()
        driver.transport.close()
        assert device.events[-1] == "close"
        assert device.activation is None or driver.get(0x70) == 0
    finally:
        stop.set()
        vcpu.join(10)
    assert device.events[-1] == "close", "nothing reaches the device any more"


def test_a_new_configuration_is_a_new_generation(driver: GuestDriver, device: Recorder) -> None:
    driver.start()
    assert driver.get(0xFC) == 0
    assert device.activation is not None
    link = device.activation.link
    link.config_changed()
    assert (driver.get(0xFC), driver.get(0x60), driver.irq.count) == (1, 2, 1)
    driver.set(0x70, 0)
    link.config_changed()
    assert (driver.get(0xFC), driver.get(0x60), driver.irq.count) == (1, 0, 1)


class RegisterWalk(RuleBasedStateMachine):
    """Any write of any size at any offset: the status stays one of a driver's, nothing breaks.

    What must hold: a device is active exactly in DRIVER_OK without NEEDS_RESET or FAILED, with
    queues that were valid when it began and have not been taken away.
    """

    @initialize()
    def set_up(self) -> None:
        self.memory = GuestMemory(2 << 20)
        self.loop = TurningLoop()
        self.driver = GuestDriver(Rng(self.memory), self.memory, self.loop)

    @rule(
        offset=st.one_of(
            st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x50, 0x64, 0x70, 0xAC, *RING_REGISTERS]),
            st.integers(0, 0xFFF),
        ),
        value=st.one_of(
            st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 16, 64, 128, 143, 0x10000, 0x12000]),
            st.integers(0, 2**32 - 1),
        ),
        size=st.sampled_from([4, 4, 4, 1, 2, 8]),
    )
    def write(self, offset: int, value: int, size: int) -> None:
        self.driver.transport.write(offset, size, value)

    @rule(offset=st.integers(0, 0xFFF), size=st.sampled_from([1, 2, 4, 8]))
    def read(self, offset: int, size: int) -> None:
        assert 0 <= self.driver.transport.read(offset, size) < 1 << 8 * size

    @rule()
    def next_step(self) -> None:
        follower = status.FOLLOWERS.get(self.driver.get(0x70))
        if follower is not None:
            if follower == 11:
                self.driver.set(0x24, 1)
                self.driver.set(0x20, 1)
            self.driver.set(0x70, follower)

    @rule()
    def place_good_rings(self) -> None:
        self.driver.set(0x30, 0)
        self.driver.place_queue(RingLayout(16, 0x10000, 0x12000, 0x14000))

    @rule(content=st.binary(max_size=64), gpa=st.sampled_from([0x10000, 0x12000, 0x14000]))
    def scribble(self, content: bytes, gpa: int) -> None:
        self.memory.write(gpa, content)

    @rule()
    def work(self) -> None:
        self.loop.settle()

    @invariant()
    def status_is_one_a_driver_can_reach(self) -> None:
        if hasattr(self, "driver"):
            assert self.driver.get(0x70) & ~(64 | 128) in (0, 1, 3, 11, 15)

    @invariant()
    def device_is_active_exactly_when_running(self) -> None:
        if hasattr(self, "driver"):
            active = self.driver.device._activation is not None
            assert not active or self.driver.get(0x70) & ~128 == 15
            [queue] = self.driver.transport._queue_registers
            assert active or self.driver.get(0x70) != 15 or not queue.ready

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.close()
            self.loop.close()
            self.memory.close()


RegisterWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestRegisterWalk = RegisterWalk.TestCase
