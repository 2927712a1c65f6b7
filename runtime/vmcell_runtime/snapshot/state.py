"""The state of a whole machine but for its memory and disks, and its JSON.

Hex strings for what KVM alone understands, plain numbers for what is ours, so that a person can
read it and two of them can be compared. `FORMAT` counts up with every change; this version reads
the formats in `READABLE`.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime.config import MAX_VCPUS
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.cpuid import CpuidEntry
from vmcell_runtime.kvm.vcpu_state import LENGTHS, VcpuState
from vmcell_runtime.snapshot.fields import (
    Tree,
    damaged,
    take_bool,
    take_bytes,
    take_int,
    take_numbers,
    take_pairs,
    take_rows,
    take_tree,
)
from vmcell_runtime.virtio.saved import QueueState, TransportState

FORMAT = 1
READABLE = (1,)
MAX_STATE_BYTES = 8 << 20
_MAX_XSAVE_BYTES = 64 << 10
_MAX_MSRS = 1024
_MAX_CPUID = 256
_MAX_WINDOWS = 64
_MAX_QUEUES = 8
_MAX_CONFIG_BYTES = 4096
_WORD, _LONG = 1 << 32, 1 << 64
_CHIP_BYTES = abi.IRQCHIP_BYTES - 8


class MachineState(NamedTuple):
    """`cpuid` is what KVM offered where the guest was booted; `transports` are in window order."""

    ram_bytes: int
    cpuid: tuple[CpuidEntry, ...]
    tsc_deadline: bool
    tsc_khz: int
    tsc: int
    kvmclock_ns: int
    irqchips: tuple[bytes, ...]
    vcpus: tuple[VcpuState, ...]
    serial: dict[str, int]
    cmos_index: int
    transports: tuple[TransportState, ...]


def encode(state: MachineState) -> bytes:
    """One JSON document."""
    tree = {
        "format": FORMAT,
        "ram_bytes": state.ram_bytes,
        "cpuid": [list(entry) for entry in state.cpuid],
        "tsc_deadline": state.tsc_deadline,
        "tsc_khz": state.tsc_khz,
        "tsc": state.tsc,
        "kvmclock_ns": state.kvmclock_ns,
        "irqchips": [{"chip": chip.hex()} for chip in state.irqchips],
        "vcpus": [_vcpu_tree(vcpu) for vcpu in state.vcpus],
        "serial": state.serial,
        "cmos_index": state.cmos_index,
        "transports": [_transport_tree(row) for row in state.transports],
    }
    return json.dumps(tree).encode()


def decode(document: bytes) -> MachineState:
    """CallerError (data_loss) for what is no state, failed_precondition for another format."""
    if len(document) > MAX_STATE_BYTES:
        raise damaged(f"its state has {len(document)} bytes")
    try:
        tree = take_tree(json.loads(document), "the state")
    except (ValueError, RecursionError) as error:
        raise damaged(f"its state is not JSON: {error}") from error
    version = take_int(tree, "format", _WORD)
    if version not in READABLE:
        raise CallerError(
            f"the saved machine has format {version}; this version of vmcell reads "
            f"{', '.join(map(str, READABLE))}: save it again with this one",
            code="failed_precondition",
        )
    state = MachineState(
        ram_bytes=take_int(tree, "ram_bytes", _LONG),
        cpuid=take_rows(tree, "cpuid", _MAX_CPUID, _cpuid_entry),
        tsc_deadline=take_bool(tree, "tsc_deadline"),
        tsc_khz=take_int(tree, "tsc_khz", _WORD),
        tsc=take_int(tree, "tsc", _LONG),
        kvmclock_ns=take_int(tree, "kvmclock_ns", 1 << 63),
        irqchips=take_rows(tree, "irqchips", abi.KVM_NR_IRQCHIPS, _irqchip),
        vcpus=take_rows(tree, "vcpus", MAX_VCPUS, _vcpu),
        serial=take_numbers(tree, "serial", 16),
        cmos_index=take_int(tree, "cmos_index", 128),
        transports=take_rows(tree, "transports", _MAX_WINDOWS, _transport),
    )
    if len(state.irqchips) != abi.KVM_NR_IRQCHIPS or not state.vcpus:
        raise damaged("it lacks processors or interrupt controllers")
    return state


def _cpuid_entry(row: object) -> CpuidEntry:
    if not isinstance(row, list) or len(row) != len(CpuidEntry._fields):
        raise damaged("cpuid has a row of the wrong length")
    # Without a loop: there are 500 of them, and a restore waits.
    if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= _WORD:
        raise damaged("cpuid has a number that is out of range")
    return CpuidEntry._make(row)


def _irqchip(row: object) -> bytes:
    return take_bytes(take_tree(row, "irqchips"), "chip", _CHIP_BYTES, _CHIP_BYTES)


def _vcpu_tree(vcpu: VcpuState) -> Tree:
    tree: Tree = {name: getattr(vcpu, name).hex() for name in (*LENGTHS, "xsave")}
    return tree | {"mp_state": vcpu.mp_state, "msrs": [list(row) for row in vcpu.msrs.items()]}


def _vcpu(row: object) -> VcpuState:
    tree = take_tree(row, "vcpus")
    opaque = {name: take_bytes(tree, name, length, length) for name, length in LENGTHS.items()}
    return VcpuState(
        mp_state=take_int(tree, "mp_state", 16),
        xsave=take_bytes(tree, "xsave", abi.XSAVE_BYTES, _MAX_XSAVE_BYTES),
        msrs=take_pairs(tree, "msrs", _MAX_MSRS),
        **opaque,
    )


def _transport_tree(row: TransportState) -> Tree:
    tree: Tree = row._asdict()
    return tree | {
        "config": row.config.hex(),
        "queues": [queue._asdict() for queue in row.queues],
    }


def _transport(row: object) -> TransportState:
    tree = take_tree(row, "transports")
    return TransportState(
        device_id=take_int(tree, "device_id", _WORD),
        config=take_bytes(tree, "config", 0, _MAX_CONFIG_BYTES),
        status=take_int(tree, "status", 256),
        device_features_select=take_int(tree, "device_features_select", _WORD),
        driver_features_select=take_int(tree, "driver_features_select", _WORD),
        driver_features=take_int(tree, "driver_features", _LONG),
        queue_select=take_int(tree, "queue_select", _WORD),
        config_generation=take_int(tree, "config_generation", _WORD),
        interrupt_status=take_int(tree, "interrupt_status", _WORD),
        queues=take_rows(tree, "queues", _MAX_QUEUES, _queue),
        own=take_numbers(tree, "own", 16),
    )


def _queue(row: object) -> QueueState:
    tree = take_tree(row, "queues")
    return QueueState(
        size=take_int(tree, "size", _WORD),
        ready=take_bool(tree, "ready"),
        descriptor_gpa=take_int(tree, "descriptor_gpa", _LONG),
        driver_gpa=take_int(tree, "driver_gpa", _LONG),
        device_gpa=take_int(tree, "device_gpa", _LONG),
        next_avail=take_int(tree, "next_avail", 1 << 16),
        used_index=take_int(tree, "used_index", 1 << 16),
    )
