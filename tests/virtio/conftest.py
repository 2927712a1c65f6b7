"""A machine of guest memory and an event loop, without KVM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fake_memory import FlippingMemory
from guest_driver import RAM_BYTES, GuestDriver, Plug
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.device import VirtioDevice


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM_BYTES)
    yield memory
    memory.close()


@pytest.fixture
def flipping_memory() -> Iterator[FlippingMemory]:
    memory = FlippingMemory(RAM_BYTES)
    yield memory
    memory.close()


@pytest.fixture
def loop() -> Iterator[TurningLoop]:
    loop = TurningLoop()
    yield loop
    loop.close()


@pytest.fixture
def plug(memory: GuestMemory, loop: TurningLoop) -> Iterator[Plug]:
    """Plugs a device in and gives the driver of it."""
    with ExitStack() as drivers:

        def plug_in(
            device: VirtioDevice, queue_size: int = 0, ram: GuestMemory | None = None
        ) -> GuestDriver:
            driver = GuestDriver(device, ram or memory, loop, queue_size)
            drivers.callback(driver.close)
            return driver

        yield plug_in
