"""The recipe for a machine, booted or restored. The only place that knows every part.

Fixed order of virtio devices: pmem, blk, net, fs, vsock, entropy, balloon, then the spare windows;
the first stands at the first window.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from vmcell_protos.errors import CallerError
from vmcell_runtime import layout
from vmcell_runtime.boot.entry import entry_fpu, entry_regs, entry_sregs
from vmcell_runtime.boot.linux import load_linux
from vmcell_runtime.bus import Bus
from vmcell_runtime.clock import NEVER, GuestClock, Time
from vmcell_runtime.config import FsConfig, MachineConfig, NetConfig
from vmcell_runtime.devices.cmos import Cmos
from vmcell_runtime.devices.console import ConsoleLog
from vmcell_runtime.devices.i8042 import I8042
from vmcell_runtime.devices.serial import Serial
from vmcell_runtime.ending import Ending
from vmcell_runtime.frame import Frame, Processor
from vmcell_runtime.hotplug import HotPlug, SparePlace
from vmcell_runtime.irq import IrqLine
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.loading import Saved, check_host, load_machine
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.machine import Machine
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.pausing import Pausing
from vmcell_runtime.saving import Saving
from vmcell_runtime.vcpu import VcpuThread
from vmcell_runtime.virtio import abi
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.blk import Blk
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.fs import Fs
from vmcell_runtime.virtio.mmio import MmioTransport
from vmcell_runtime.virtio.net import Net
from vmcell_runtime.virtio.pmem import Pmem
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.vhost_net import VhostNet
from vmcell_runtime.virtio.vhost_user import FrontEnd
from vmcell_runtime.virtio.vsock.device import Vsock
from vmcell_runtime.virtio.window import SpareWindow

Report = Callable[[str], None]
"""Takes one line for the operator's log."""


class Descriptors:
    """The descriptors that came with a configuration. Owns those not given away; idempotent."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds: dict[int, int] = dict(enumerate(fds))

    def use(self, index: int) -> int:
        """The descriptor, still ours; KeyError once it was given away."""
        return self._fds[index]

    def give(self, index: int) -> int:
        """The descriptor, now the taker's to close."""
        return self._fds.pop(index)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


@dataclass(frozen=True, kw_only=True)
class _Board:
    """What every device is plugged into."""

    vm: Vm
    memory: GuestMemory
    loop: EventLoop
    irqs: Mapping[int, IrqLine]
    report: Report
    resources: ExitStack
    ports: Bus = field(default_factory=Bus)
    windows: Bus = field(default_factory=Bus)
    transports: list[MmioTransport] = field(default_factory=list)


def boot(
    config: MachineConfig,
    descriptors: Descriptors,
    frame: Frame,
    listeners: Sequence[socket.socket],
    report: Report,
) -> Machine:
    """A machine whose first instruction is the kernel's entry; nothing runs yet.

    Takes what it keeps from `descriptors`, and owns `frame`, made for this machine's size, and
    `listeners` (one for each of `config.vsock.listen_ports`) also when it raises. One of the three
    errors says what was wrong.
    """
    return _build(config, descriptors, frame, listeners, report, None)


def restore(
    config: MachineConfig,
    descriptors: Descriptors,
    frame: Frame,
    listeners: Sequence[socket.socket],
    report: Report,
    saved: Saved,
) -> Machine:
    """A machine that goes on where `saved` stood, and stands still until it is resumed.

    `config` describes the machine as it was booted, with devices of its own: their files and
    sockets are this one's. What does not fit is a CallerError. Else as `boot`; `saved.memory_fd`
    stays the caller's.
    """
    return _build(config, descriptors, frame, listeners, report, saved)


def _build(
    config: MachineConfig,
    descriptors: Descriptors,
    frame: Frame,
    listeners: Sequence[socket.socket],
    report: Report,
    saved: Saved | None,
) -> Machine:
    with ExitStack() as resources:
        for sock in listeners:
            resources.callback(sock.close)
        resources.callback(frame.close)
        processor = _processor(frame, config, saved)
        board = _make_board(config, descriptors, frame, report, resources)
        if saved is not None:
            board.memory.lay_image(saved.memory_fd)
        ending, serial, cmos = _add_legacy_devices(config, descriptors, board)
        spare = config.spare_window_numbers
        fixed = frame.windows[: spare.start]
        vsock, balloon = _add_virtio_devices(config, descriptors, board, listeners, fixed)
        places = dict(zip(spare, frame.windows[spare.start :], strict=True))
        hotplug = _add_spare_windows(places, board, frame.address_bits)
        threads = _make_threads(frame.vcpus, board, ending)
        if saved is None:
            time = _load_kernel(config, descriptors, frame)
        else:
            serial.load(saved.state.serial)
            cmos.index = saved.state.cmos_index
            time = load_machine(saved.state, frame, board.transports)
        frame.system.close()  # whoever takes this process over finds no way to make another VM
        clock = GuestClock(board.vm, frame.vcpus, time)
        pausing = Pausing(board.loop, threads, clock, paused=saved is not None)
        saving = Saving(
            vm=board.vm,
            memory=board.memory,
            vcpus=frame.vcpus,
            processor=processor,
            serial=serial,
            cmos=cmos,
            transports=board.transports,
            hotplug=hotplug,
            pausing=pausing,
        )
        return Machine(
            loop=board.loop,
            ending=ending,
            vcpus=threads,
            ports=board.ports,
            windows=board.windows,
            serial=serial,
            vsock=vsock,
            balloon=balloon,
            hotplug=hotplug,
            pausing=pausing,
            saving=saving,
            resources=resources.pop_all(),
        )


def _processor(frame: Frame, config: MachineConfig, saved: Saved | None) -> Processor:
    """The processor as the guest sees it: this host's, or the one it already knows."""
    if saved is None:
        return frame.processor
    state = saved.state
    check_host(state, config, frame.processor)
    return frame.show(state.cpuid, tsc_deadline=state.tsc_deadline)


def _make_board(
    config: MachineConfig,
    descriptors: Descriptors,
    frame: Frame,
    report: Report,
    resources: ExitStack,
) -> _Board:
    """The frame with the images in its pmem windows."""
    for slot, pmem in zip(frame.images, config.pmem, strict=True):
        frame.memory.lay_file(slot.number, descriptors.use(pmem.descriptor))
    return _Board(
        vm=frame.vm,
        memory=frame.memory,
        loop=frame.loop,
        irqs=frame.irqs,
        report=report,
        resources=resources,
    )


def _add_legacy_devices(
    config: MachineConfig, descriptors: Descriptors, board: _Board
) -> tuple[Ending, Serial, Cmos]:
    ending = Ending(board.loop)
    console_fd = None
    if config.console_descriptor is not None:
        console_fd = descriptors.give(config.console_descriptor)
        board.resources.callback(os.close, console_fd)
    serial = Serial(board.irqs[layout.SERIAL_GSI], ConsoleLog(console_fd, ending.words.line))
    board.ports.add(layout.SERIAL_PORT, layout.SERIAL_PORTS, serial)
    reset = I8042(lambda: ending.end("guest_reset", "the guest pulled the reset line"))
    board.ports.add(layout.KEYBOARD_PORT, layout.KEYBOARD_PORTS, reset)
    cmos = Cmos()
    board.ports.add(layout.CMOS_PORT, layout.CMOS_PORTS, cmos)
    return ending, serial, cmos


def _add_virtio_devices(
    config: MachineConfig,
    descriptors: Descriptors,
    board: _Board,
    listeners: Sequence[socket.socket],
    windows: Sequence[tuple[int, int]],
) -> tuple[Vsock | None, Balloon | None]:
    """Every device present at boot at its window, in the fixed order."""
    irqs = [board.irqs[gsi] for _, gsi in windows]
    images = board.memory.slots()[len(board.memory.ram_ranges) :]
    devices: list[VirtioDevice] = [
        Pmem(board.memory, image.gpa, image.length_bytes) for image in images
    ]
    for number, blk in enumerate(config.blk):
        fd = descriptors.use(blk.descriptor)
        disk = Blk(board.memory, fd, read_only=blk.read_only, serial=f"vmcell{number}")
        descriptors.give(blk.descriptor)
        board.resources.callback(disk.close)
        devices.append(disk)
    for net in config.net:
        devices.append(_make_net(net, descriptors, board, irqs[len(devices)]))
    for fs in config.fs:
        devices.append(_make_fs(fs, descriptors, board, irqs[len(devices)]))
    vsock = None
    if config.vsock is not None:
        vsock = Vsock(board.memory, board.loop, config.vsock.guest_cid)
        board.resources.callback(vsock.close)
        for port, sock in zip(config.vsock.listen_ports, listeners, strict=True):
            vsock.listen(port, sock)
        devices.append(vsock)
    devices.append(Rng(board.memory))
    balloon = Balloon(board.memory) if config.balloon else None
    if balloon is not None:
        devices.append(balloon)
    for device, (gpa, _), irq in zip(devices, windows, irqs, strict=True):
        _add_virtio_device(board, device, gpa, irq)
    return vsock, balloon


def _add_spare_windows(
    windows: Mapping[int, tuple[int, int]], board: _Board, address_bits: int
) -> HotPlug:
    """Empty windows, and who fills them; `windows` is (gpa, GSI) by number."""
    places = {}
    for number, (gpa, gsi) in windows.items():
        window = SpareWindow()
        board.windows.add(gpa, layout.VIRTIO_WINDOW_BYTES, window)
        places[number] = SparePlace(window, gpa, board.irqs[gsi])
    hotplug = HotPlug(
        vm=board.vm,
        memory=board.memory,
        loop=board.loop,
        report=board.report,
        places=places,
        address_bits=address_bits,
    )
    board.resources.callback(hotplug.close)
    return hotplug


def _make_net(net: NetConfig, descriptors: Descriptors, board: _Board, irq: IrqLine) -> Net:
    vhost = None
    if net.vhost_descriptor is not None:
        vhost_fd = descriptors.use(net.vhost_descriptor)
        vhost = VhostNet(board.memory, vhost_fd, irq.fd)
        descriptors.give(net.vhost_descriptor)
        board.resources.callback(vhost.close)
    tap_fd = descriptors.use(net.tap_descriptor)
    device = Net(board.memory, board.loop, tap_fd, mac=net.mac_bytes, mtu=net.mtu, vhost=vhost)
    descriptors.give(net.tap_descriptor)
    board.resources.callback(device.close)
    return device


def _make_fs(fs: FsConfig, descriptors: Descriptors, board: _Board, irq: IrqLine) -> Fs:
    sock = _unix_socket(descriptors.give(fs.descriptor))
    board.resources.callback(sock.close)
    front_end = FrontEnd(sock)
    device = Fs(board.memory, board.loop, front_end, irq.fd, tag=fs.tag, report=board.report)
    board.resources.callback(device.close)
    return device


def _unix_socket(fd: int) -> socket.socket:
    try:
        return socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise CallerError(f"fs.descriptor is no socket: {error.strerror}") from error


def _add_virtio_device(board: _Board, device: VirtioDevice, gpa: int, irq: IrqLine) -> None:
    transport = MmioTransport(device, board.memory, irq, board.loop, board.report)
    board.resources.callback(transport.close)
    board.transports.append(transport)
    board.windows.add(gpa, layout.VIRTIO_WINDOW_BYTES, transport)
    for fd, value in transport.notifications:
        board.vm.add_ioeventfd(fd, gpa + abi.MMIO_QUEUE_NOTIFY, abi.NOTIFY_BYTES, value)


def _make_threads(vcpus: Sequence[Vcpu], board: _Board, ending: Ending) -> list[VcpuThread]:
    return [
        VcpuThread(number, vcpu, ports=board.ports, windows=board.windows, end_machine=ending.end)
        for number, vcpu in enumerate(vcpus)
    ]


def _load_kernel(config: MachineConfig, descriptors: Descriptors, frame: Frame) -> Time:
    """vCPU 0 stands at the entry; the others wait for INIT and SIPI in the kernel's LAPICs."""
    kernel_fd = descriptors.use(config.kernel_descriptor)
    entry = load_linux(
        frame.memory, kernel_fd, config.command_line, frame.windows, config.vcpu_count
    )
    first = frame.vcpus[0]
    first.set_sregs(entry_sregs(first.get_sregs()))
    first.set_regs(entry_regs(entry))
    first.set_fpu(entry_fpu())
    return NEVER
