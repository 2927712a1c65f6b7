"""Devices that come and go under a running guest, friendly or not (lane kvm)."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from payload import SPIN, elf, memory_file
from vmm_bench import DEADLINE_S, Bench, assemble, vmm_bench

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.config import MachineConfig
from vmcell_runtime.control import Boot, PlugBlk, PlugPmem, Request, encode
from vmcell_runtime.handle import VmmHandle, launch
from vmcell_runtime.memory import HUGE_PAGE_BYTES

pytestmark = pytest.mark.kvm

SUPPORT = Path(__file__).parents[1] / "support"
DISKS, IMAGES = (1, 2), (3, 4)
ROUNDS = 5
MAX_GROWTH_KIB = 8 << 10


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with vmm_bench(tmp_path) as bench:
        yield bench


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Looks into windows 1 to 4 and says the first byte of what is there."""
    return assemble(SUPPORT / "hotplug_guest.S", tmp_path_factory.mktemp("hotplug"))


@contextmanager
def file_of(letter: bytes, length: int = HUGE_PAGE_BYTES) -> Iterator[int]:
    with tempfile.NamedTemporaryFile(prefix="hotplug-image") as file:
        file.write(letter * 512)
        file.truncate(length)
        fd = os.open(file.name, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def plug(vmm: VmmHandle, window: int, letter: bytes) -> None:
    with file_of(letter) as fd:
        if window in DISKS:
            vmm.plug_blk(window, fd)
        else:
            vmm.plug_pmem(window, fd)


def held(pid: int) -> tuple[int, int]:
    """Descriptors of the VMM, and how often one of our files is mapped or open there."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    maps = Path(f"/proc/{pid}/maps").read_text()
    images = sum("hotplug-image" in link for link in links) + maps.count("hotplug-image")
    return len(links), images


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def letter_of(number: int) -> bytes:
    return bytes([ord("A") + number % 26])


def test_a_running_guest_uses_what_comes_and_misses_what_goes(bench: Bench, looking: bytes) -> None:
    vmm = bench.launch(looking, spare_windows=4)
    before = held(vmm.pid)
    length, number = 0, 0
    for _ in range(ROUNDS):
        for window in (*DISKS, *IMAGES):
            letter, number = letter_of(number), number + 1
            plug(vmm, window, letter)
            bench.wait_console(lambda more, letter=letter: more.count(letter) > 4, length)
            vmm.unplug(window)
            length = len(bench.console)
            plug(vmm, window, b"!")
            bench.wait_console(lambda more: more.count(b"!") > 4, length)
            # One letter the guest had read already may still come; \xff is what no device answers.
            assert set(bench.console[length:].replace(letter, b"", 1)) <= set(b"!?\xff\n")
            vmm.unplug(window)
            length = len(bench.console)
    assert held(vmm.pid) == (before[0], 0)
    vmm.kill()
    vmm.wait_exit(DEADLINE_S)
    assert bench.log == ""


def test_all_windows_at_once(bench: Bench, looking: bytes) -> None:
    vmm = bench.launch(looking, spare_windows=4)
    for number, window in enumerate((*DISKS, *IMAGES)):
        plug(vmm, window, letter_of(number))
    bench.wait_console(lambda text: all(text.count(letter_of(n)) > 4 for n in range(4)))
    assert held(vmm.pid)[1] == 2 + 2, "each disk, and each image by its mapping"
    for window in (*DISKS, *IMAGES):
        vmm.unplug(window)
    assert held(vmm.pid)[1] == 0


def test_a_paused_guest_finds_it_afterwards(bench: Bench, looking: bytes) -> None:
    vmm = bench.launch(looking, spare_windows=4)
    vmm.pause()
    plug(vmm, 1, b"A")
    plug(vmm, 3, b"B")
    assert bench.console == b""
    vmm.resume()
    bench.wait_console(lambda text: {b"A"[0], b"B"[0]} <= set(text))
    vmm.pause()
    vmm.unplug(1)
    vmm.unplug(3)
    length = len(bench.console)
    vmm.resume()
    plug(vmm, 2, b"C")
    bench.wait_console(lambda text: text.count(b"C") > 2, length)


def test_what_cannot_be_done_is_said_and_changes_nothing(bench: Bench) -> None:
    vmm = bench.launch(SPIN, spare_windows=24)
    with file_of(b"", 0) as empty, file_of(b"x") as fd:
        for window in (0, 25):
            with pytest.raises(CallerError, match=f"window {window} is not a spare one.*1 to 24"):
                vmm.plug_blk(window, fd)
        with pytest.raises(CallerError, match="0 bytes; give a regular file"):
            vmm.plug_pmem(1, empty)
        with pytest.raises(CallerError, match="not opened O_RDONLY"):
            vmm.plug_blk(1, fd, read_only=True)
        with pytest.raises(CallerError, match="window 1 is empty"):
            vmm.unplug(1)
        for window in range(1, 25):
            vmm.plug_pmem(window, fd)
        with pytest.raises(CallerError, match="window 24 has a device already"):
            vmm.plug_blk(24, fd)
    assert held(vmm.pid)[1] == 24
    for window in range(1, 25):
        vmm.unplug(window)
    assert held(vmm.pid)[1] == 0


def test_a_machine_without_spare_windows(bench: Bench) -> None:
    vmm = bench.launch(SPIN)
    with file_of(b"x") as fd, pytest.raises(CallerError, match="of this machine: none"):
        vmm.plug_pmem(1, fd)
    with pytest.raises(CallerError, match="has no balloon"):
        vmm.set_balloon(0)
    with pytest.raises(CallerError, match="has no balloon"):
        vmm.balloon()
    vmm.kill()
    vmm.wait_exit(DEADLINE_S)
    with file_of(b"x") as fd, pytest.raises(HostError, match="ended: killed"):
        vmm.plug_pmem(1, fd)


@pytest.mark.parametrize(
    "request_",
    [
        PlugPmem(request_id=1, window=1),
        PlugBlk(request_id=1, window=1, read_only=False),
        Boot(config=MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0), uid=0),
    ],
)
def test_a_message_that_does_not_fit_ends_the_vmm(bench: Bench, request_: Request) -> None:
    vmm = bench.launch(SPIN, spare_windows=1)
    vmm._sock.send(encode(request_))
    ended = vmm.wait_exit(DEADLINE_S)
    assert ended.reason == "vmm_error"
    assert "with 0 descriptors" in ended.detail


def test_the_balloons_wish_is_bounded(bench: Bench) -> None:
    vmm = bench.launch(SPIN, memory_mib=256, balloon=True)
    vmm.set_balloon(192)
    assert vmm.balloon() == (192, 0)
    with pytest.raises(CallerError, match="193 of 256 MiB"):
        vmm.set_balloon(193)
    vmm.set_balloon(0)
    assert vmm.balloon() == (0, 0)


@pytest.mark.parametrize("seed", [1, 0xDEADBEEF, 2**63 + 7])
def test_plugging_under_a_guest_that_plays_with_every_register(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Random accesses to eight windows, seven of which get and lose devices all the time."""
    code = assemble(SUPPORT / "hostile_guest.S", tmp_path_factory.mktemp("hostile"))
    start = struct.pack("<IIQ", 2**32 - 1, 2, seed)  # it never ends by itself
    config = MachineConfig(
        vcpu_count=1,
        memory_mib=64,
        kernel_descriptor=0,
        console_descriptor=1,
        spare_windows=7,
    )
    with ExitStack() as resources:
        kernel = memory_file(elf(start + code[16:], entry=0x10_0010))
        resources.callback(os.close, kernel)
        vmm = launch(config, [kernel, bench.console_fd], log_fd=bench.log_fd)
        resources.callback(vmm.close)
        disk = resources.enter_context(file_of(b"x"))
        before = held(vmm.pid)
        for number in range(2 * ROUNDS):
            for window in range(1, 8):
                (vmm.plug_pmem if window % 2 else vmm.plug_blk)(window, disk)
            vmm.pause()
            vmm.resume()
            for window in range(1, 8):
                vmm.unplug(window)
            if number == 0:
                before_kib = resident_kib(vmm.pid)
        assert held(vmm.pid) == before
        assert resident_kib(vmm.pid) - before_kib < MAX_GROWTH_KIB
        vmm.kill()
        assert vmm.wait_exit(DEADLINE_S).reason == "killed"
    assert "Traceback" not in bench.log
    assert bench.log.count("\n") <= 10 * 14 * ROUNDS, "ten lines of each device at most"
