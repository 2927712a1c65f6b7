"""The virtio-mmio transport: one register window, its queues and its interrupt (virtio 1.2 § 4.2).

`read` and `write` are called by vCPU threads, queue notifications and everything a device does by
the event loop. One lock guards it all, and no holder ever waits for another thread, so a reset is
complete when the driver's write returns. The interrupt registers have a lock of their own: an
interrupt handler in the guest does not wait for a disk.

Queue addresses and features are copied at DRIVER_OK into objects that no register can change.

After `close` the window answers as one without a device, whoever still looks at it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import ParamSpec

from vmcell_protos.errors import CallerError, GuestError
from vmcell_runtime.irq import Interrupt
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, status
from vmcell_runtime.virtio.device import (
    Activation,
    VirtioDevice,
)
from vmcell_runtime.virtio.queue import Queue, RingLayout
from vmcell_runtime.virtio.reporter import Report, Reporter
from vmcell_runtime.virtio.saved import QueueState, TransportState

P = ParamSpec("P")

_LOW_32 = 0xFFFF_FFFF
_HIGH_32 = 0xFFFF_FFFF_0000_0000
_NO_SHM_REGION = 0xFFFF_FFFF  # length and base of a region that does not exist, § 4.2.2

# Disks, images and sockets: what a driver read there it holds for true.
_FIXED_CONFIG = (abi.DEVICE_ID_BLOCK, abi.DEVICE_ID_PMEM, abi.DEVICE_ID_SOCKET)

_EMPTY_REGISTERS = {
    abi.MMIO_MAGIC: abi.MMIO_MAGIC_VALUE,
    abi.MMIO_VERSION: abi.MMIO_VERSION_VALUE,
    abi.MMIO_DEVICE_ID: abi.DEVICE_ID_NONE,
    abi.MMIO_VENDOR_ID: abi.MMIO_VENDOR_VALUE,
}


def read_empty(offset: int, size: int) -> int:
    """What a window without a device answers: who it would be, and no device (§ 4.2.2)."""
    return _EMPTY_REGISTERS.get(offset, 0) if size == 4 else 0


class _QueueRegisters:
    """What a driver has written about one queue; means nothing before DRIVER_OK."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        self.descriptor_gpa = 0
        self.driver_gpa = 0
        self.device_gpa = 0


# register → (field of _QueueRegisters, bits of it that the register keeps, shift of the value)
_ADDRESS_REGISTERS: dict[int, tuple[str, int, int]] = {
    abi.MMIO_QUEUE_DESCRIPTOR_LOW: ("descriptor_gpa", _HIGH_32, 0),
    abi.MMIO_QUEUE_DESCRIPTOR_HIGH: ("descriptor_gpa", _LOW_32, 32),
    abi.MMIO_QUEUE_DRIVER_LOW: ("driver_gpa", _HIGH_32, 0),
    abi.MMIO_QUEUE_DRIVER_HIGH: ("driver_gpa", _LOW_32, 32),
    abi.MMIO_QUEUE_DEVICE_LOW: ("device_gpa", _HIGH_32, 0),
    abi.MMIO_QUEUE_DEVICE_HIGH: ("device_gpa", _LOW_32, 32),
}


class _ActivationLink:
    """The `Link` of one activation; a later one, or a reset, makes it mute."""

    def __init__(self, transport: MmioTransport) -> None:
        self._transport = transport

    def signal(self, *queues: Queue) -> None:
        # No short cut: every queue must be flushed, whatever the first one says.
        if any([queue.flush() for queue in queues]):
            self._transport.interrupt(abi.INTERRUPT_USED_BUFFER)

    def run(self, step: Callable[[], None]) -> bool:
        return self._transport.run_for(self, step)

    def guard(self, function: Callable[P, None]) -> Callable[P, None]:
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            self._transport.run_for(self, lambda: function(*args, **kwargs))

        return guarded

    def process_soon(self, queue_index: int) -> None:
        self._transport.process_soon(self, queue_index)

    def config_changed(self) -> None:
        self._transport.config_changed(self)


class MmioTransport:
    """One device at one window. Owns the notification eventfds and closes the device with it.

    `report` gets a line when the guest broke a rule, at most 10 in 5 seconds.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        irq: Interrupt,
        loop: EventLoop,
        report: Report,
    ) -> None:
        self._device = device
        self._memory = memory
        self._irq = irq
        self._loop = loop
        self._report = Reporter(report)
        self._lock = threading.RLock()
        self._interrupt_lock = threading.Lock()
        self._interrupt_status = 0
        self._config_generation = 0
        self._offered = device.features | abi.F_VERSION_1 | abi.F_EVENT_IDX
        self.ignored_accesses = 0
        self._link: _ActivationLink | None = None
        self._queues: tuple[Queue, ...] = ()
        self._clear_registers()
        self._due: set[int] = set()
        self._next_queue = 0
        count = len(device.queue_sizes) if device.in_kernel else 1
        self._notify_fds: tuple[int, ...] = tuple(
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)
        )
        if not device.in_kernel:
            loop.add(self._notify_fds[0], self._notified)
        self._closed = False

    # The window

    def read(self, offset: int, size: int) -> int:
        """The value of a register, or of `size` bytes of configuration space."""
        if offset == abi.MMIO_INTERRUPT_STATUS:
            return self._read_interrupt_status()
        with self._lock:
            if self._closed:
                return read_empty(offset, size)
            if offset >= abi.MMIO_CONFIG:
                start = offset - abi.MMIO_CONFIG
                return int.from_bytes(self._device.config[start : start + size], "little")
            if size == 4:
                return self._read_register(offset)
            self.ignored_accesses += 1
            return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register write of the guest; what has no meaning is counted and ignored (V2)."""
        if offset == abi.MMIO_INTERRUPT_ACK:
            with self._interrupt_lock:
                self._interrupt_status &= ~value
            return
        with self._lock:
            if self._closed:
                return
            if offset >= abi.MMIO_CONFIG:
                done = self._write_config(offset - abi.MMIO_CONFIG, size, value)
            else:
                done = size == 4 and self._write_register(offset, value)
            self.ignored_accesses += not done

    @property
    def status(self) -> int:
        """The device status register as the guest would read it."""
        return self._status

    @property
    def notifications(self) -> list[tuple[int, int | None]]:
        """(eventfd, value) of each write to QUEUE_NOTIFY that shall signal it; None for any value.

        The host's kernel wants to know which queue was meant; we look at all of a device, which is
        cheaper than a descriptor for each.
        """
        if self._device.in_kernel:
            return [(fd, queue) for queue, fd in enumerate(self._notify_fds)]
        return [(self._notify_fds[0], None)]

    # Another process's turn

    def save(self) -> TransportState:
        """All that a successor needs, on the loop's thread, while no vCPU is in the guest.

        Nothing touches guest memory from here on until `go_on`. CallerError for a device that
        others have a hand in.
        """
        if self._device.device_id == abi.DEVICE_ID_FS:
            raise CallerError(
                "a guest with live directories of the host cannot be saved; use volumes or copies",
                code="failed_precondition",
            )
        with self._lock:
            device = self._device
            suspended = device.suspend()
            if suspended is not None:
                positions = list(suspended)
            else:
                positions = [queue.position for queue in self._queues] if self._link else []
            positions += [(0, 0)] * (len(self._queue_registers) - len(positions))
            return TransportState(
                device_id=device.device_id,
                config=device.config,
                status=self._status,
                device_features_select=self._device_features_select,
                driver_features_select=self._driver_features_select,
                driver_features=self._driver_features,
                queue_select=self._queue_select,
                config_generation=self._config_generation,
                interrupt_status=self._interrupt_status,
                queues=tuple(
                    QueueState(
                        row.size,
                        row.ready,
                        row.descriptor_gpa,
                        row.driver_gpa,
                        row.device_gpa,
                        *position,
                    )
                    for row, position in zip(self._queue_registers, positions, strict=True)
                ),
                own=device.remembered(),
            )

    def go_on(self) -> None:
        """The opposite of `save` where this process goes on by itself."""
        with self._lock:
            self._device.proceed()

    def load(self, state: TransportState) -> None:
        """Takes over from a transport of the same kind, before any vCPU runs.

        CallerError if it cannot have been one; the guest is told of what is lost with the other.
        """
        with self._lock:
            self._check_predecessor(state)
            self._status = state.status
            self._device_features_select = state.device_features_select
            self._driver_features_select = state.driver_features_select
            self._driver_features = state.driver_features
            self._queue_select = state.queue_select
            self._config_generation = state.config_generation
            for row, saved in zip(self._queue_registers, state.queues, strict=True):
                row.size, row.ready = saved.size, saved.ready
                row.descriptor_gpa, row.driver_gpa = saved.descriptor_gpa, saved.driver_gpa
                row.device_gpa = saved.device_gpa
            self._device.remember(state.own)
            # A driver that has taken a queue from its device has stopped it.
            count = self._device.queue_count(self._driver_features)
            if self._status == status.RUNNING and all(
                row.ready for row in self._queue_registers[:count]
            ):
                try:
                    self._take_over(state)
                except GuestError as error:
                    raise CallerError(
                        f"the queues of virtio device {state.device_id} cannot be: {error}",
                        code="data_loss",
                    ) from error
            # A line that was raised for it may not have reached the guest.
            if state.interrupt_status or (self._device.in_kernel and self._link is not None):
                self.interrupt(state.interrupt_status)

    def _check_predecessor(self, state: TransportState) -> None:
        device = self._device
        if state.device_id != device.device_id or len(state.queues) != len(self._queue_registers):
            raise CallerError(
                f"a device of kind {state.device_id} with {len(state.queues)} queues was saved "
                f"where {device.device_id} with {len(self._queue_registers)} is",
                code="failed_precondition",
            )
        if device.device_id in _FIXED_CONFIG and state.config != device.config:
            raise CallerError(
                f"virtio device {state.device_id} was saved with configuration "
                f"{state.config.hex()} and is {device.config.hex()} now; has its file changed?",
                code="failed_precondition",
            )
        unknown = state.driver_features & ~self._offered
        if unknown:
            raise CallerError(
                f"the driver of virtio device {state.device_id} uses features {unknown:#x}, which "
                "are not offered here",
                code="failed_precondition",
            )

    def _take_over(self, state: TransportState) -> None:
        self._activate(tuple((row.next_avail, row.used_index) for row in state.queues))
        self._device.tell_restored()

    def close(self) -> None:
        """Takes the notifications off the loop, closes them and the device; idempotent.

        On the loop's thread. It waits for no driver: one that is bound finds an empty window.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._device.close()  # vsock hands out what the guest sent last
            self._link = None
            with self._interrupt_lock:
                self._interrupt_status = 0
            for fd in self._notify_fds:
                if not self._device.in_kernel:
                    self._loop.remove(fd)
                os.close(fd)

    # For links

    def interrupt(self, cause: int) -> None:
        """Records why and raises the line."""
        with self._interrupt_lock:
            self._interrupt_status |= cause
        self._irq.fire()

    def config_changed(self, link: _ActivationLink) -> None:
        """A new generation of the configuration and its interrupt, if `link` is still running."""
        with self._lock:
            if link is self._link:
                self._config_generation = (self._config_generation + 1) & _LOW_32
                self.interrupt(abi.INTERRUPT_CONFIG_CHANGE)

    def process_soon(self, link: _ActivationLink, queue_index: int) -> None:
        """As if the driver had notified this queue, if `link` is still running."""
        with self._lock:
            if link is self._link:
                self._due.add(queue_index)
                os.eventfd_write(self._notify_fds[0], 1)

    def run_for(self, link: _ActivationLink | None, step: Callable[[], None]) -> bool:
        """Runs `step` under the lock if `link` is the running activation, else returns False."""
        with self._lock:
            if link is None or link is not self._link:
                return False
            try:
                step()
            except GuestError as error:
                self._fail(error)
            return True

    # Registers

    def _clear_registers(self) -> None:
        self._status = status.RESET
        self._device_features_select = 0
        self._driver_features_select = 0
        self._driver_features = 0
        self._queue_select = 0
        self._queue_registers = [_QueueRegisters() for _ in self._device.queue_sizes]
        self._link = None

    def _selected_queue(self) -> _QueueRegisters | None:
        if self._queue_select < len(self._queue_registers):
            return self._queue_registers[self._queue_select]
        return None

    def _read_register(self, offset: int) -> int:
        queue = self._selected_queue()
        match offset:
            case abi.MMIO_MAGIC:
                return abi.MMIO_MAGIC_VALUE
            case abi.MMIO_VERSION:
                return abi.MMIO_VERSION_VALUE
            case abi.MMIO_DEVICE_ID:
                return self._device.device_id
            case abi.MMIO_VENDOR_ID:
                return abi.MMIO_VENDOR_VALUE
            case abi.MMIO_DEVICE_FEATURES:
                return _word(self._offered, self._device_features_select)
            case abi.MMIO_QUEUE_SIZE_MAX:
                return self._device.queue_sizes[self._queue_select] if queue else 0
            case abi.MMIO_QUEUE_READY:
                return int(queue.ready) if queue else 0
            case abi.MMIO_STATUS:
                return self._status
            case (
                abi.MMIO_SHM_LENGTH_LOW
                | abi.MMIO_SHM_LENGTH_HIGH
                | abi.MMIO_SHM_BASE_LOW
                | abi.MMIO_SHM_BASE_HIGH
            ):
                return _NO_SHM_REGION
            case abi.MMIO_CONFIG_GENERATION:
                return self._config_generation
        self.ignored_accesses += 1
        return 0

    def _write_register(self, offset: int, value: int) -> bool:
        """False if the write has no meaning now."""
        match offset:
            case abi.MMIO_STATUS:
                return self._write_status(value)
            case abi.MMIO_DEVICE_FEATURES_SELECT:
                self._device_features_select = value
            case abi.MMIO_DRIVER_FEATURES_SELECT:
                self._driver_features_select = value
            case abi.MMIO_QUEUE_SELECT:
                self._queue_select = value
            case abi.MMIO_DRIVER_FEATURES:
                return self._write_features(value)
            case abi.MMIO_QUEUE_NOTIFY:
                return self._write_notify(value)
            case abi.MMIO_SHM_SELECT:
                pass
            case _:
                return self._write_queue_register(offset, value)
        return True

    def _write_config(self, offset: int, size: int, value: int) -> bool:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return self._device.write_config(offset, data)

    def _write_features(self, value: int) -> bool:
        if self._status != status.DRIVER or self._driver_features_select > 1:
            return False
        shift = 32 * self._driver_features_select
        kept = self._driver_features & ~(_LOW_32 << shift)
        self._driver_features = kept | value << shift
        return True

    def _write_queue_register(self, offset: int, value: int) -> bool:
        queue = self._selected_queue()
        if queue is None:
            return False
        if self._status != status.FEATURES_OK:
            return offset == abi.MMIO_QUEUE_READY and not value & 1 and self._take_queue(queue)
        if offset in _ADDRESS_REGISTERS:
            field, kept, shift = _ADDRESS_REGISTERS[offset]
            setattr(queue, field, getattr(queue, field) & kept | value << shift)
        elif offset == abi.MMIO_QUEUE_SIZE:
            queue.size = value
        elif offset == abi.MMIO_QUEUE_READY:
            queue.ready = bool(value & 1)
        else:
            return False
        return True

    def _take_queue(self, queue: _QueueRegisters) -> bool:
        """The driver takes a queue from a running device, § 4.2.2.2; Linux's virtio-pmem does.

        No driver goes on with the other queues, so the device stops altogether.
        """
        if not queue.ready:
            return False
        queue.ready = False
        self._link = None
        self._device.reset()
        return True

    def _write_notify(self, value: int) -> bool:
        # Normally the host's kernel answers this write by the eventfd (KVM_IOEVENTFD).
        if value >= len(self._queue_registers):
            return False
        os.eventfd_write(self._notify_fds[value if self._device.in_kernel else 0], 1)
        return True

    # Life

    def _write_status(self, value: int) -> bool:
        new = status.next_status(self._status, value)
        if new is None:
            return False
        if new == status.RESET:
            self._reset()
        elif new == status.FEATURES_OK and not self._features_acceptable():
            return False
        else:
            self._status = new
            if new == status.RUNNING:
                self._start()
        return True

    def _features_acceptable(self) -> bool:
        unknown = self._driver_features & ~self._offered
        return not unknown and bool(self._driver_features & abi.F_VERSION_1)

    def _start(self) -> None:
        try:
            self._activate(())
        except GuestError as error:
            self._fail(error)

    def _activate(self, positions: tuple[tuple[int, int], ...]) -> None:
        """Hands the device its queues; `positions` of a predecessor's, none for a new start."""
        link = self._link = _ActivationLink(self)
        count = self._device.queue_count(self._driver_features)
        queues = tuple(
            self._freeze(registers, max_size)
            for registers, max_size in zip(
                self._queue_registers[:count], self._device.queue_sizes[:count], strict=True
            )
        )
        for queue, (next_avail, used_index) in zip(queues, positions, strict=False):
            queue.resume(next_avail, used_index, ())
        self._queues = queues
        self._device.activate(Activation(self._driver_features, queues, self._notify_fds, link))
        self._due = set(range(count))  # buffers may have been offered before DRIVER_OK
        for fd in self._notify_fds:
            os.eventfd_write(fd, 1)

    def _freeze(self, registers: _QueueRegisters, max_size: int) -> Queue:
        if not registers.ready:
            raise GuestError("the driver set DRIVER_OK with a queue that is not ready")
        layout = RingLayout(
            registers.size, registers.descriptor_gpa, registers.driver_gpa, registers.device_gpa
        )
        layout.check(self._memory, max_size)
        return Queue(
            self._memory,
            layout,
            max_chain_bytes=self._device.max_chain_bytes,
            indirect=bool(self._driver_features & abi.F_INDIRECT_DESC),
            event_idx=bool(self._driver_features & abi.F_EVENT_IDX),
        )

    def _reset(self) -> None:
        self._clear_registers()
        self._device.reset()
        with self._interrupt_lock:
            self._interrupt_status = 0

    def _notified(self, _events: int) -> None:
        try:
            os.eventfd_read(self._notify_fds[0])
        except BlockingIOError:
            return
        self.run_for(self._link, self._process)

    def _process(self) -> None:
        """All queues that want it, up to the first that uses up its budget: the next one's turn is
        the next time."""
        count = len(self._queues)
        for step in range(count):
            index = (self._next_queue + step) % count
            if index not in self._due and not self._queues[index].has_news():
                continue
            self._due.discard(index)
            if self._device.process(index):
                self._due.add(index)
                self._next_queue = index + 1
                os.eventfd_write(self._notify_fds[0], 1)
                return

    def _fail(self, error: GuestError) -> None:
        # The device stops and lets go of what it holds; only the driver's reset brings it back.
        self._link = None
        self._status |= abi.STATUS_NEEDS_RESET
        self._device.reset()
        self.interrupt(abi.INTERRUPT_CONFIG_CHANGE)
        self._report(f"virtio device {self._device.device_id} stopped: {error}")

    def _read_interrupt_status(self) -> int:
        with self._interrupt_lock:
            # With vhost the kernel raises the interrupt past us. The guest must then find a reason
            # in this register; a needless "used buffer" costs it one look at its rings.
            if self._device.in_kernel and not self._closed:
                return self._interrupt_status | abi.INTERRUPT_USED_BUFFER
            return self._interrupt_status


def _word(value: int, index: int) -> int:
    return value >> 32 * index & _LOW_32 if index < 2 else 0
