"""Which machine measured, and in which lane: figures of different ones are not to be compared."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from vmcell_runtime.kvm.host_kind import host_kind
from vmcell_tools.dev_qemu import ACCELERATOR_WORD

SOFTWARE_CPU = "QEMU TCG"
_MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
_TOTAL = re.compile(r"^MemTotal:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`kvm` is a HostKind's kind. `clock` is "wall", or "instructions": then one instruction is a
    nanosecond. `load_1m` is the load average when the run began."""

    kernel: str
    cpu: str
    cpus: int
    memory_mib: int
    kvm: str
    lane: str
    clock: str
    python: str
    load_1m: float


def this_machine(root: str = "/") -> Machine:
    """The host whose tree is at `root`; raises HostError where it cannot be read."""
    cpu = _found(_MODEL, Path(root, "proc/cpuinfo").read_text(), "unknown")
    command_line = Path(root, "proc/cmdline").read_text()
    kvm = host_kind(root).kind
    lane, clock = lane_of(cpu, command_line, kvm)
    return Machine(
        kernel=platform.release(),
        cpu=cpu,
        cpus=os.cpu_count() or 1,
        memory_mib=int(_found(_TOTAL, Path(root, "proc/meminfo").read_text(), "0")) >> 10,
        kvm=kvm,
        lane=lane,
        clock=clock,
        python=platform.python_version(),
        load_1m=load_1m(root),
    )


def lane_of(cpu: str, command_line: str, kvm: str) -> tuple[str, str]:
    """(lane, clock) by the processor's name, the kernel's command line and the kind of /dev/kvm."""
    accelerator = ""
    for word in command_line.split():
        if word.startswith(ACCELERATOR_WORD):
            accelerator = word.removeprefix(ACCELERATOR_WORD)
    if accelerator == "icount":
        return "dev VM on QEMU's software CPU, instructions counted", "instructions"
    if SOFTWARE_CPU in cpu:
        return "dev VM on QEMU's software CPU", "wall"
    if accelerator:
        return f"dev VM on {accelerator}", "wall"
    if kvm == "pvm":
        return "native, kvm_pvm: kernel code of guests is emulated", "wall"
    return f"native, /dev/kvm: {kvm}", "wall"


def load_1m(root: str = "/") -> float:
    """The load average of the last minute."""
    return float(Path(root, "proc/loadavg").read_text().split()[0])


def available_bytes(root: str = "/") -> int:
    """MemAvailable."""
    return int(_found(_AVAILABLE, Path(root, "proc/meminfo").read_text(), "0")) << 10


def _found(pattern: re.Pattern[str], text: str, otherwise: str) -> str:
    match = pattern.search(text)
    return match[1].strip() if match else otherwise
