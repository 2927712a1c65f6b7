"""A VMM saved to files and restored in others: the guest goes on exactly where it stood."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from payload import HLT_FOREVER, SPIN, say
from vmm_bench import DEADLINE_S, Bench, vmm_bench

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.config import VsockConfig
from vmcell_runtime.handle import VmmHandle

pytestmark = pytest.mark.kvm

# movw $0x3f8, %dx; xor %al, %al; 1: out %al, %dx; inc %al; jmp 1b
COUNT = b"\x66\xba\xf8\x03\x30\xc0\xee\xfe\xc0\xeb\xfb"
# mov $0x200000, %rbx; 1: incb (%rbx); mov (%rbx), %al; mov $0x3f8, %dx; out %al, %dx;
# add $0x1000, %rbx; and $0x3fffff, %ebx; or $0x200000, %ebx; jmp 1b
# Counts in 512 pages, one after the other, and tells each new value.
TOUCH = (
    b"\x48\xbb\x00\x00\x20\x00\x00\x00\x00\x00\xfe\x03\x8a\x03\x66\xba\xf8\x03\xee"
    b"\x48\x81\xc3\x00\x10\x00\x00\x81\xe3\xff\xff\x3f\x00\x81\xcb\x00\x00\x20\x00\xeb\xe2"
)
PAGES = 512


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with vmm_bench(tmp_path) as bench:
        yield bench


def counted(console: bytes, start: int = 0) -> bool:
    """The console holds what COUNT says, nothing lost and nothing twice."""
    cycle = itertools.islice(itertools.cycle(range(256)), start, None)
    return console == bytes(itertools.islice(cycle, len(console)))


def touched(console: bytes) -> bool:
    """The same for TOUCH: every page's count goes up by one at each visit."""
    return all(byte == (n // PAGES + 1) & 0xFF for n, byte in enumerate(console))


def end(vmm: VmmHandle) -> None:
    vmm.kill()
    vmm.wait_exit(DEADLINE_S)


def test_a_restored_guest_goes_on_where_it_stood(bench: Bench, tmp_path: Path) -> None:
    vmm, snapshot = bench.launch(COUNT), None
    for number in range(5):
        bench.wait_console(lambda more: len(more) > 100, len(bench.console))
        vmm.pause()
        snapshot = bench.save(vmm, tmp_path / str(number), base=snapshot)
        end(vmm)
        vmm = bench.restore(snapshot)
        length = len(bench.console)
        with pytest.raises(TimeoutError):
            vmm.wait_exit(0.05)
        assert len(bench.console) == length, "it stands still until it is told to go on"
        vmm.resume()
    bench.wait_console(lambda more: len(more) > 100, len(bench.console))
    end(vmm)
    assert counted(bench.console)


def test_the_source_goes_on_too_and_its_clones_know_nothing_of_it(
    bench: Bench, tmp_path: Path
) -> None:
    vmm = bench.launch(TOUCH)
    bench.wait_console(lambda more: len(more) > 1000)
    vmm.pause()
    snapshot = bench.save(vmm, tmp_path / "snapshot")
    at_save = bench.console
    before = (snapshot / "memory").read_bytes()
    vmm.resume()
    bench.wait_console(lambda more: len(more) > 2000, len(at_save))
    end(vmm)
    assert touched(bench.console)
    for _ in range(3):
        start = len(bench.console)
        clone = bench.restore(snapshot)
        clone.resume()
        bench.wait_console(lambda more: len(more) > 2000, start)
        end(clone)
        assert touched(at_save + bench.console[start:])
    assert (snapshot / "memory").read_bytes() == before, "nobody wrote to the snapshot"


def test_a_second_save_writes_what_has_changed(bench: Bench, tmp_path: Path) -> None:
    vmm = bench.launch(say(b"x\n") + HLT_FOREVER)
    bench.wait_console(bool)
    vmm.pause()
    first = bench.save(vmm, tmp_path / "first")
    allocated = (first / "memory").stat().st_blocks * 512
    assert 4096 <= allocated < 4 << 20, "what was never touched is a hole"
    with (first / "memory").open("rb") as memory, (tmp_path / "again").open("w+b") as again:
        again.write(memory.read())
        again.flush()
        with (tmp_path / "state").open("wb") as state:
            assert vmm.save(again.fileno(), state.fileno()) == 0, "nothing ran in between"
    end(vmm)
    vmm = bench.launch(TOUCH)
    vmm.pause()
    chain = bench.save(vmm, tmp_path / "chain0")
    for number in range(1, 6):
        vmm.resume()
        bench.wait_console(lambda more: len(more) > 700, len(bench.console))
        vmm.pause()
        chain = bench.save(vmm, tmp_path / f"chain{number}", base=chain)
    end(vmm)
    told = bench.console.removeprefix(b"x\n")
    start = len(bench.console)
    clone = bench.restore(chain)
    clone.resume()
    bench.wait_console(lambda more: len(more) > 2000, start)
    end(clone)
    assert touched(told + bench.console[start:])


@pytest.mark.parametrize("code", [SPIN, HLT_FOREVER], ids=["spinning", "halted"])
def test_eight_vcpus(bench: Bench, tmp_path: Path, code: bytes) -> None:
    vmm = bench.launch(say(b"x\n") + code, vcpu_count=8, balloon=True, spare_windows=2)
    bench.wait_console(bool)
    vmm.pause()
    snapshot = bench.save(vmm, tmp_path / "snapshot")
    end(vmm)
    clone = bench.restore(snapshot, vcpu_count=8, balloon=True, spare_windows=2)
    clone.resume()
    clone.pause()
    assert clone.balloon() == (0, 0)
    end(clone)


def test_only_what_stands_still_is_saved(bench: Bench, tmp_path: Path) -> None:
    vmm = bench.launch(COUNT, spare_windows=1)
    with pytest.raises(CallerError, match="pause it first"):
        bench.save(vmm, tmp_path / "running")
    vmm.pause()
    with (tmp_path / "disk").open("w+b") as disk:
        disk.truncate(4096)
        vmm.plug_blk(1, disk.fileno())
    with pytest.raises(CallerError, match="plugged in while it ran"):
        bench.save(vmm, tmp_path / "plugged")
    vmm.unplug(1)
    bench.save(vmm, tmp_path / "empty")
    vmm.resume()
    bench.wait_console(lambda more: len(more) > 100, len(bench.console))
    end(vmm)
    assert counted(bench.console)


def test_a_full_disk_leaves_the_guest_as_it_was(bench: Bench) -> None:
    vmm = bench.launch(COUNT)
    bench.wait_console(lambda more: len(more) > 100)
    vmm.pause()
    memory_fd = os.memfd_create("small", os.MFD_ALLOW_SEALING)
    state_fd = os.open("/dev/full", os.O_WRONLY)
    try:
        os.ftruncate(memory_fd, 64 << 20)
        with pytest.raises(HostError, match="No space left"):
            vmm.save(memory_fd, state_fd)
    finally:
        os.close(memory_fd)
        os.close(state_fd)
    vmm.resume()
    bench.wait_console(lambda more: len(more) > 100, len(bench.console))
    end(vmm)
    assert counted(bench.console)


def test_a_save_that_failed_is_no_base_of_the_next(bench: Bench, tmp_path: Path) -> None:
    vmm = bench.launch(TOUCH)
    bench.wait_console(lambda more: len(more) > 1000)
    vmm.pause()
    with (tmp_path / "failed").open("w+b") as memory, open("/dev/full", "wb") as full:
        memory.truncate(64 << 20)
        with pytest.raises(HostError, match="No space left"):
            vmm.save(memory.fileno(), full.fileno())
    snapshot = bench.save(vmm, tmp_path / "snapshot")
    end(vmm)
    start = len(bench.console)
    clone = bench.restore(snapshot)
    clone.resume()
    bench.wait_console(lambda more: len(more) > 2000, start)
    end(clone)
    assert touched(bench.console)


def test_what_does_not_fit_is_refused(bench: Bench, tmp_path: Path) -> None:
    vmm = bench.launch(COUNT, vsock=VsockConfig(guest_cid=3))
    vmm.pause()
    snapshot = bench.save(vmm, tmp_path / "snapshot")
    end(vmm)
    cid = VsockConfig(guest_cid=3)
    for fields, words in (
        ({"memory_mib": 128, "vsock": cid}, "64 MiB and 1 vCPUs"),
        ({"vcpu_count": 2, "vsock": cid}, "64 MiB and 1 vCPUs"),
        ({"vsock": cid, "balloon": True}, "2 devices, this machine 3"),
        ({"balloon": True}, "kind 19"),
        ({"vsock": VsockConfig(guest_cid=4)}, "configuration"),
    ):
        with pytest.raises(CallerError, match=words):
            bench.restore(snapshot, **fields)
    state = json.loads((snapshot / "state").read_text())
    original = dict(state)
    for change, words in (
        ({"format": 2}, "has format 2"),
        ({"tsc_khz": original["tsc_khz"] * 2}, "runs at"),
        ({"cpuid": [[0x1, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF]]}, "processor lacks: vendor"),
        ({"irqchips": original["irqchips"][:2]}, "lacks processors or interrupt controllers"),
        ({"vcpus": []}, "64 MiB|lacks processors"),
        ({"serial": {}}, "serial port"),
    ):
        (snapshot / "state").write_text(json.dumps(original | change))
        with pytest.raises(CallerError, match=words):
            bench.restore(snapshot, vsock=cid)
    for text in ("", "{", "[]", "null", '{"format": true}'):
        (snapshot / "state").write_text(text)
        with pytest.raises(CallerError, match="damaged"):
            bench.restore(snapshot, vsock=cid)
    (snapshot / "state").write_text(json.dumps(original))
    os.truncate(snapshot / "memory", (64 << 20) - 4096)
    with pytest.raises(CallerError, match="cannot be the RAM"):
        bench.restore(snapshot, vsock=cid)
