"""A guest that plays with every register: it may hurt itself, not the VMM (safety rules 2.6).

Oracles: the VMM lives until it is killed or ends for a reason of the guest's; it does not grow.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from payload import CODE_GPA, elf, memory_file
from vmm_bench import assemble

from vmcell_runtime.config import BlkConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import launch
from vmcell_runtime.memory import HUGE_PAGE_BYTES

pytestmark = pytest.mark.kvm

SOURCE = Path(__file__).parents[1] / "support" / "hostile_guest.S"
ROUNDS = 20_000
DEADLINE_S = 60
START_OFFSET = 16
MAX_GROWTH_KIB = 8 << 10
PORTS, WINDOWS = 1, 2


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return assemble(SOURCE, tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as resources:
        yield resources


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def file(resources: ExitStack, size: int = 0) -> int:
    """The descriptor of an unnamed file, open until the test's end."""
    fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR, 0o600)
    resources.callback(os.close, fd)
    os.truncate(fd, size)
    return fd


@pytest.mark.parametrize("what", [PORTS, WINDOWS, PORTS | WINDOWS])
@pytest.mark.parametrize("seed", [1, 2**63 + 7, 0xDEADBEEF])
def test_random_accesses_hurt_nobody_else(
    code: bytes, resources: ExitStack, seed: int, what: int
) -> None:
    start = struct.pack("<IIQ", ROUNDS, what, seed)
    kernel = memory_file(elf(start + code[START_OFFSET:], entry=CODE_GPA + START_OFFSET))
    resources.callback(os.close, kernel)
    console, log = file(resources), file(resources)
    fds = [kernel, file(resources, HUGE_PAGE_BYTES), file(resources, 1 << 20), console]
    config = MachineConfig(
        vcpu_count=1,
        memory_mib=64,
        kernel_descriptor=0,
        pmem=(PmemConfig(descriptor=1),),
        blk=(BlkConfig(descriptor=2),),
        console_descriptor=3,
        vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
    )
    vmm = launch(config, fds, log_fd=log)
    resources.callback(vmm.close)
    before_kib = resident_kib(vmm.pid)
    deadline = time.monotonic() + DEADLINE_S
    while not os.pread(console, 1 << 21, 0).endswith(b"\nDONE\n"):
        assert time.monotonic() < deadline, os.pread(log, 1 << 20, 0).decode()
        with pytest.raises(TimeoutError):
            vmm.wait_exit(0.05)
    assert resident_kib(vmm.pid) - before_kib < MAX_GROWTH_KIB
    vmm.kill()
    assert vmm.wait_exit(10).reason == "killed"
    said = os.pread(log, 1 << 20, 0).decode()
    assert "Traceback" not in said
    assert said.count("\n") <= 60, "what a guest does wrong is logged, but not without bound"
