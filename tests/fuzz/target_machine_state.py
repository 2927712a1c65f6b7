"""state.json of a saved machine, and the transports in it loaded into devices.

Faces a file, which anybody may have written. What decodes comes back from its own JSON the same;
what a device takes over is a device that a new driver can use; else CallerError.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack

from guest_driver import GuestDriver
from json_input import expand
from recorded_irq import RecordedIrq
from turning_loop import TurningLoop

from vmcell_protos.errors import CallerError
from vmcell_runtime.devices.console import ConsoleLog
from vmcell_runtime.devices.serial import Serial
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.vcpu_state import LENGTHS
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.snapshot.state import decode, encode
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.blk import Blk
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.rng import Rng
from vmcell_runtime.virtio.saved import TransportState
from vmcell_runtime.virtio.vsock.device import Vsock

ALLOWED: tuple[type[Exception], ...] = (CallerError,)
REACHES = (
    "vmcell_runtime.virtio.mmio:MmioTransport.load",
    "vmcell_runtime.virtio.mmio:MmioTransport._take_over",
    "vmcell_runtime.devices.serial:Serial.load",
    "vmcell_runtime.virtio.vsock.device:Vsock.tell_restored",
)
RAM_BYTES = 4 << 20
MOST_TRANSPORTS = 6


def one(data: bytes) -> None:
    state = decode(expand(data))
    assert decode(encode(state)) == state
    with ExitStack() as opened:
        memory = GuestMemory(RAM_BYTES)
        opened.callback(memory.close)
        loop = TurningLoop()
        opened.callback(loop.close)
        for transport in state.transports[:MOST_TRANSPORTS]:
            _load(transport, memory, loop, opened)
        Serial(RecordedIrq(), ConsoleLog(None, lambda _: None)).load(state.serial)


def _load(state: TransportState, memory: GuestMemory, loop: TurningLoop, opened: ExitStack) -> None:
    device = _device(state.device_id, memory, loop)
    if device is None:
        return
    driver = GuestDriver(device, memory, loop, 8)
    opened.callback(driver.close)
    driver.transport.load(state)
    loop.settle()
    driver.start()
    assert driver.get(0x70) == 15


def _device(device_id: int, memory: GuestMemory, loop: TurningLoop) -> VirtioDevice | None:
    match device_id:
        case 2:
            fd = os.memfd_create("disk", os.MFD_CLOEXEC)
            os.truncate(fd, 64 << 10)
            return Blk(memory, fd, read_only=False, serial="x")
        case 4:
            return Rng(memory)
        case 5:
            return Balloon(memory)
        case 19:
            return Vsock(memory, loop, 3)
    return None


def _tree() -> dict[str, object]:
    """A whole machine, with fillings for what KVM alone understands."""
    vcpu: dict[str, object] = {name: f"@{length}" for name, length in LENGTHS.items()}
    vcpu |= {"xsave": f"@{abi.XSAVE_BYTES}", "mp_state": 0, "msrs": [[16, 5]]}
    return {
        "format": 1,
        "ram_bytes": RAM_BYTES,
        "cpuid": [[1, 0, 0, 1, 2, 3, 4]],
        "tsc_deadline": True,
        "tsc_khz": 2_000_000,
        "tsc": 99,
        "kvmclock_ns": 5,
        "irqchips": [{"chip": f"@{abi.IRQCHIP_BYTES - 8}"}] * abi.KVM_NR_IRQCHIPS,
        "vcpus": [vcpu],
        "serial": Serial(RecordedIrq(), ConsoleLog(None, lambda _: None)).save(),
        "cmos_index": 10,
        "transports": [],
    }


def _saved(device_id: int) -> dict[str, object]:
    """The state of a device of that kind whose driver runs."""
    with ExitStack() as opened:
        memory = GuestMemory(RAM_BYTES)
        opened.callback(memory.close)
        loop = TurningLoop()
        opened.callback(loop.close)
        device = _device(device_id, memory, loop)
        assert device is not None
        driver = GuestDriver(device, memory, loop, 8)
        opened.callback(driver.close)
        driver.start()
        state = driver.transport.save()
    row = state._asdict()
    return {**row, "config": state.config.hex(), "queues": [q._asdict() for q in state.queues]}


def seeds() -> dict[str, bytes]:
    tree = _tree()
    documents = {"no-devices": tree}
    for name, device_id in (("blk", 2), ("rng", 4), ("balloon", 5), ("vsock", 19)):
        documents[name] = {**tree, "transports": [_saved(device_id)]}
    return {
        name: json.dumps(row, separators=(",", ":")).encode() for name, row in documents.items()
    }
