"""What the jail costs: an exit of the guest, a block request, and a start, with it and without.

`chrt -f 50 python tests/support/jail_cost.py [ROUNDS]`, as root, prints docs/security.md's table.
The ways take turns, each round in fresh processes; of each the median and the least are shown.
`open` is a VMM without any of its jail, `unsealed` one without the filter of system calls.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tests/support", "protos", "runtime", "tools", "api")]
sys.path[:0] = [str(ROOT / "shim")]

import guest_driver  # noqa: E402
from payload import HLT_FOREVER, RESET, elf, memory_file  # noqa: E402
from turning_loop import TurningLoop  # noqa: E402

from vmcell_runtime import handle, jail  # noqa: E402
from vmcell_runtime.config import MachineConfig  # noqa: E402
from vmcell_runtime.irq import IrqLine  # noqa: E402
from vmcell_runtime.memory import GuestMemory  # noqa: E402
from vmcell_runtime.virtio.blk import Blk  # noqa: E402

EXITS = 30_000
REQUESTS = 10_000
WAYS = {
    "open": "import vmcell_runtime.vmm as v; v.enter = lambda *a: True; v.seal = lambda: None; ",
    "unsealed": "import vmcell_runtime.vmm as v; v.seal = lambda: None; ",
    "jailed": "",
}
# Writes how long the guest ran to the log.
_CLOCK = (
    "import os, time, vmcell_runtime.machine as m; run = m.Machine.run; "
    "m.Machine.run = lambda s: (b := time.perf_counter_ns(), e := run(s), "
    "os.write(2, b'ran %d ns\\n' % (time.perf_counter_ns() - b)))[1]; "
)
# mov ecx, EXITS; mov dx, 0x2f8; 1: in al, dx; dec ecx; jnz 1b
_READ_A_PORT = b"\xb9" + EXITS.to_bytes(4, "little") + b"\x66\xba\xf8\x02\xec\xff\xc9\x75\xfb"


def exit_ns(way: str) -> float:
    """One exit for a port that nobody has: KVM_RUN, the bus, KVM_RUN."""
    with tempfile.TemporaryFile() as log:
        launch(way, _READ_A_PORT + RESET + HLT_FOREVER, log.fileno()).wait_exit(60)
        log.seek(0)
        found = re.search(rb"ran (\d+) ns", log.read())
    assert found is not None
    return int(found[1]) / EXITS


def start_ms(way: str) -> float:
    """From the wish for a VMM to its vCPU's run."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        vmm = launch(way, HLT_FOREVER, log.fileno())
        took = time.perf_counter() - began
        vmm.close()
    return took * 1e3


def launch(way: str, code: bytes, log_fd: int) -> handle.VmmHandle:
    plain = handle._BOOTSTRAP
    handle._BOOTSTRAP = plain.replace("; main(", f"; {WAYS[way]}{_CLOCK}main(")
    kernel = memory_file(elf(code))
    try:
        config = MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0)
        return handle.launch(config, [kernel], log_fd=log_fd)
    finally:
        os.close(kernel)
        handle._BOOTSTRAP = plain


def block_ns(way: str) -> float:
    """One read of 4 KiB from the page cache: notification, loop, device, interrupt; no guest."""
    command = [sys.executable, __file__, "block", way]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout)


def be_block_device(way: str) -> None:
    guest_driver.RecordedIrq = lambda: IrqLine(5)  # type: ignore[assignment,misc]  # a real eventfd
    file = memory_file(os.urandom(1 << 20))
    os.ftruncate(file, 1 << 20)
    memory, loop = GuestMemory(guest_driver.RAM_BYTES), TurningLoop()
    driver = guest_driver.GuestDriver(
        Blk(memory, os.open(f"/proc/self/fd/{file}", os.O_RDWR), read_only=False, serial="x"),
        memory,
        loop,
    )
    driver.start()
    queue = driver.queues[0]
    if way != "open":
        jail.enter(2_000_000_000, jail.Bounds(guest_driver.RAM_BYTES, 1 << 20), None)
    if way == "jailed":
        jail.seal()
    header, rooms = queue.place(bytes(16)), (queue.room(4096), queue.room(1))
    total = 0
    for _ in range(REQUESTS):
        queue.offer_spans([header], rooms)
        queue.want_interrupts()
        began = time.perf_counter_ns()
        driver.kick(0)
        total += time.perf_counter_ns() - began
        ((_, written),) = queue.collect()
        assert written == 4097
    os.write(1, str(total / REQUESTS).encode())
    os._exit(0)


def main() -> None:
    if sys.argv[1:2] == ["block"]:
        be_block_device(sys.argv[2])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    sys.stdout.write(f"{platform.release()}, CPython {platform.python_version()}, n = {rounds}\n")
    for what, measure in (("exit ns", exit_ns), ("block ns", block_ns), ("start ms", start_ms)):
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, values in found.items():
                values.append(measure(way))
        for way, values in found.items():
            least, median = min(values), statistics.median(values)
            share = 100 * (median / statistics.median(found["open"]) - 1)
            least_share = 100 * (least / min(found["open"]) - 1)
            sys.stdout.write(
                f"{what} {way}: median {median:.2f} ({share:+.1f} %), "
                f"least {least:.2f} ({least_share:+.1f} %)\n"
            )


if __name__ == "__main__":
    os.environ["VMCELL_ZYGOTE"] = ""
    main()
