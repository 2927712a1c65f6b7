"""Pause and resume of a running VMM: nothing moves, nothing is lost, and everything else works."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from payload import HLT_FOREVER, RESET, SPIN, load32, say, store32
from vmm_bench import DEADLINE_S, Bench, processor_ticks, vmm_bench

from vmcell_protos.errors import HostError
from vmcell_runtime.config import VsockConfig
from vmcell_runtime.handle import VmmHandle
from vmcell_runtime.kvm.host_kind import host_kind

pytestmark = pytest.mark.kvm

# movw $0x3f8, %dx; xor %al, %al; 1: out %al, %dx; inc %al; jmp 1b
COUNT = b"\x66\xba\xf8\x03\x30\xc0\xee\xfe\xc0\xeb\xfb"
# movw $0x3f8, %bx; 1: rdtsc; shl $32, %rdx; or %rax, %rdx; mov %rdx, %rcx; mov %bx, %dx;
# mov $8, %esi; 2: mov %cl, %al; out %al, %dx; shr $8, %rcx; dec %esi; jnz 2b; jmp 1b
TELL_TIME = (
    b"\x66\xbb\xf8\x03\x0f\x31\x48\xc1\xe2\x20\x48\x09\xc2\x48\x89\xd1\x89\xda"
    b"\xbe\x08\x00\x00\x00\x88\xc8\xee\x48\xc1\xe9\x08\xff\xce\x75\xf5\xeb\xdc"
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with vmm_bench(tmp_path) as bench:
        yield bench


def still_there(vmm: VmmHandle, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        vmm.wait_exit(seconds)


def test_a_paused_guest_does_nothing_and_goes_on_where_it_stood(bench: Bench) -> None:
    vmm = bench.launch(COUNT)
    length = 0
    for _ in range(10):
        length = bench.wait_console(lambda more: len(more) > 100, length)
        vmm.pause()
        length, ticks = len(bench.console), processor_ticks(vmm.pid)
        still_there(vmm, 0.05)
        assert len(bench.console) == length
        assert processor_ticks(vmm.pid) - ticks <= 1
        vmm.resume()
    bench.wait_console(lambda more: len(more) > 100, length)
    vmm.kill()
    vmm.wait_exit(DEADLINE_S)
    expected = itertools.islice(itertools.cycle(range(256)), len(bench.console))
    assert bench.console == bytes(expected), "no output was lost or made twice"


@pytest.mark.parametrize("code", [SPIN, HLT_FOREVER], ids=["spinning", "halted"])
@pytest.mark.parametrize("vcpus", [1, 8])
def test_wherever_the_vcpus_are(bench: Bench, code: bytes, vcpus: int) -> None:
    vmm = bench.launch(say(b"x\n") + code, vcpu_count=vcpus)
    bench.wait_console(bool)
    for _ in range(5):
        vmm.pause()
        ticks = processor_ticks(vmm.pid)
        still_there(vmm, 0.05)
        assert processor_ticks(vmm.pid) - ticks <= 1
        vmm.resume()


def test_both_may_be_asked_again(bench: Bench) -> None:
    vmm = bench.launch(COUNT)
    vmm.resume()
    for _ in range(3):
        vmm.pause()
    length = len(bench.console)
    for _ in range(3):
        vmm.resume()
    bench.wait_console(lambda more: len(more) > 100, length)


def test_many_threads_that_pause_and_resume(bench: Bench) -> None:
    vmm = bench.launch(COUNT, vcpu_count=2)

    def ask() -> None:
        for _ in range(20):
            vmm.pause()
            vmm.resume()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    vmm.resume()
    bench.wait_console(lambda more: len(more) > 100, len(bench.console))


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_paused_vmm_ends_like_any_other(bench: Bench, end: str) -> None:
    vmm = bench.launch(COUNT)
    vmm.pause()
    still_there(vmm, 0.05)
    getattr(vmm, end)()
    ended = vmm.wait_exit(DEADLINE_S)
    if end == "kill":
        assert ended == ("killed", "signal 9 ended the VMM")
    with pytest.raises(HostError, match=r"could not be asked|was asked to resume"):
        vmm.resume()


def test_a_guest_that_panicked_before_the_pause_still_ends(bench: Bench) -> None:
    vmm = bench.launch(say(b"Kernel panic - not syncing: last words\n") + HLT_FOREVER)
    bench.wait_console(lambda text: text.endswith(b"words\n"))
    vmm.pause()
    ended = vmm.wait_exit(DEADLINE_S)
    assert ended == ("guest_panic", "Kernel panic - not syncing: last words")


def test_a_guest_ends_after_the_pause(bench: Bench, tmp_path: Path) -> None:
    """It resets itself when it sees a device in the spare window, which comes during the pause."""
    map_windows = store32(0xA018, 0x300003) + store32(0x300400, 0xD0000083)
    look = load32(0xD0001008) + b"\x85\xc0\x74\xf0"  # again: ...; test %eax, %eax; jz again
    vmm = bench.launch(say(b"x\n") + map_windows + look + RESET + HLT_FOREVER, spare_windows=1)
    bench.wait_console(bool)
    vmm.pause()
    with (tmp_path / "disk").open("w+b") as disk:
        disk.truncate(4096)
        vmm.plug_blk(1, disk.fileno())
    still_there(vmm, 0.3)
    vmm.resume()
    assert vmm.wait_exit(DEADLINE_S).reason == "guest_reset"


def test_other_requests_are_answered_while_paused(bench: Bench) -> None:
    vmm = bench.launch(COUNT, vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)), balloon=True)
    vmm.pause()
    with pytest.raises(HostError, match="no driver yet"):
        vmm.connect_vsock(1025)
    assert vmm.balloon() == (0, 0)
    vmm.resume()


def test_the_time_stamp_counter_stands_still_too(bench: Bench) -> None:
    vmm = bench.launch(TELL_TIME)
    for _ in range(3):
        vmm.resume()
        length = bench.wait_console(lambda more: len(more) > 800, len(bench.console))
        vmm.pause()
        still_there(vmm, 0.5)
    console = bench.console
    stamps = [stamp for (stamp,) in struct.iter_unpack("<Q", console[: len(console) // 8 * 8])]
    assert length > 0
    assert stamps == sorted(stamps), "it never goes back"
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    # kvm_pvm takes an offset of the counter and ignores it.
    assert (max(steps) < 0.25 * ticks_per_second()) is (host_kind().kind != "pvm")


def ticks_per_second() -> float:
    """The host's counter; slower by a little than what cpuinfo may say in turbo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1]) * 1e6
    raise AssertionError("no frequency in /proc/cpuinfo")
