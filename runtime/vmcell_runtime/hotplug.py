"""Devices that come and go while the guest runs, at the spare windows of its machine.

    empty --plug: memory slot, transport, notifications--> plugged --unplug--> empty

The guest hears nothing of it from here: the agent has Linux probe the window again, and let go of
it. A guest that has not let go finds an empty window, missing memory and a disk that never answers;
that is its own trouble. Nothing here waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime import layout
from vmcell_runtime.irq import Interrupt
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.memory import GuestMemory, Slot
from vmcell_runtime.virtio import abi
from vmcell_runtime.virtio.blk import Blk
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.mmio import MmioTransport
from vmcell_runtime.virtio.pmem import Pmem
from vmcell_runtime.virtio.window import SpareWindow


class SparePlace(NamedTuple):
    """One spare window: what the bus has there, its address and its (shared) interrupt line."""

    window: SpareWindow
    gpa: int
    irq: Interrupt


class _Plugged(NamedTuple):
    transport: MmioTransport
    slot: Slot | None


class HotPlug:
    """Plugs and unplugs; on the loop's thread. Owns what is plugged in; `close` is idempotent.

    `address_bits` is what the guest's processor can address. Each descriptor given is owned from
    the call on, also when it raises. A disk is closed at unplug; an image's is closed as soon as it
    is mapped.
    """

    def __init__(
        self,
        *,
        vm: Vm,
        memory: GuestMemory,
        loop: EventLoop,
        report: Callable[[str], None],
        places: Mapping[int, SparePlace],
        address_bits: int,
    ) -> None:
        self._vm = vm
        self._memory = memory
        self._loop = loop
        self._report = report
        self._places = places
        self._address_bits = address_bits
        self._plugged: dict[int, _Plugged] = {}

    def plug_pmem(self, number: int, fd: int) -> None:
        """A read-only image at window `number`; a regular file padded to a multiple of 2 MiB.

        It gets the lowest free GiB behind RAM, and a memory slot of its own.
        """
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            self._check_empty(number)
            slot = self._memory.map_file(fd, self._free_gpa(os.fstat(fd).st_size))
            undo.callback(self._memory.unmap_file, slot.number)
            self._vm.add_slot(slot)
            undo.pop_all()
        os.close(fd)
        self._plug(number, Pmem(self._memory, slot.gpa, slot.length_bytes), slot)

    def plug_blk(self, number: int, fd: int, *, read_only: bool) -> None:
        """A disk at window `number`; `fd` is open O_RDONLY if `read_only`, else O_RDWR."""
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            self._check_empty(number)
            disk = Blk(self._memory, fd, read_only=read_only, serial=f"window{number}")
            undo.pop_all()
        self._plug(number, disk, None)

    def unplug(self, number: int) -> None:
        """Empties window `number`, whatever the guest is doing with its device.

        The window answers as empty first; then the device is reset, its queues are never looked at
        again, and what it had of the host is closed.
        """
        place = self._place(number)
        plugged = self._plugged.pop(number, None)
        if plugged is None:
            raise CallerError(f"window {number} is empty; nothing to unplug", code="not_found")
        place.window.transport = None
        for fd, value in plugged.transport.notifications:
            gpa = place.gpa + abi.MMIO_QUEUE_NOTIFY
            self._vm.remove_ioeventfd(fd, gpa, abi.NOTIFY_BYTES, value)
        plugged.transport.close()
        if plugged.slot is not None:
            self._end_slot(plugged.slot)

    @property
    def plugged(self) -> tuple[int, ...]:
        """Numbers of the windows that have a device."""
        return tuple(self._plugged)

    def close(self) -> None:
        """Closes the devices. Slots and mappings end with the VM and its memory, after this."""
        for plugged in self._plugged.values():
            plugged.transport.close()
        self._plugged.clear()

    def _plug(self, number: int, device: VirtioDevice, slot: Slot | None) -> None:
        place = self._places[number]
        gpa = place.gpa + abi.MMIO_QUEUE_NOTIFY
        with ExitStack() as undo:
            if slot is not None:
                undo.callback(self._end_slot, slot)
            transport = MmioTransport(device, self._memory, place.irq, self._loop, self._report)
            undo.callback(transport.close)
            for fd, value in transport.notifications:
                self._vm.add_ioeventfd(fd, gpa, abi.NOTIFY_BYTES, value)
                undo.callback(self._vm.remove_ioeventfd, fd, gpa, abi.NOTIFY_BYTES, value)
            undo.pop_all()
        self._plugged[number] = _Plugged(transport, slot)
        place.window.transport = transport

    def _end_slot(self, slot: Slot) -> None:
        self._vm.remove_slot(slot)
        self._memory.unmap_file(slot.number)

    def _place(self, number: int) -> SparePlace:
        place = self._places.get(number)
        if place is None:
            spare = f"{min(self._places)} to {max(self._places)}" if self._places else "none"
            raise CallerError(f"window {number} is not a spare one; of this machine: {spare}")
        return place

    def _check_empty(self, number: int) -> None:
        self._place(number)
        if number in self._plugged:
            raise CallerError(f"window {number} has a device already", code="already_exists")

    def _free_gpa(self, length_bytes: int) -> int:
        taken = [(slot.gpa, slot.length_bytes) for slot in self._memory.slots()]
        first_gpa = layout.first_pmem_gpa(self._memory.ram_bytes)
        gpa = layout.free_pmem_gpa(first_gpa, taken, length_bytes)
        if gpa + length_bytes > 1 << self._address_bits:
            raise CallerError(
                f"an image of {length_bytes} bytes does not fit below the guest's "
                f"{self._address_bits} address bits; unplug another",
                code="resource_exhausted",
            )
        return gpa
