"""A VMM that was ready before it was asked for is a VMM like any other, and none is missed."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from payload import HLT_FOREVER, RESET, SPIN, say
from shim_harness import wait_until
from vmm_bench import DEADLINE_S, Bench
from zygote_harness import Zygote, children, descriptors, end, memory_kib, parent, state

from vmcell_protos.errors import VmcellError
from vmcell_runtime import zygote_client
from vmcell_runtime.config import BlkConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import VmmHandle
from vmcell_runtime.memory import HUGE_PAGE_BYTES

pytestmark = pytest.mark.kvm


@pytest.fixture
def zygote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zygote]:
    """One that keeps a spare, and takes this process for a shim of its own installation."""
    with tempfile.TemporaryDirectory(prefix="vmcell-z") as folder:
        started = Zygote(f"{folder}/z")
        started.environment["VMCELL_SPARES"] = "1"
        started.start()
        installation = started.hello().output
        monkeypatch.setenv("VMCELL_ZYGOTE", started.path)
        monkeypatch.setattr(zygote_client, "installation", lambda: installation)
        # So that a busy machine does not send a test the direct way.
        monkeypatch.setattr(zygote_client, "FORKED_WITHIN_S", DEADLINE_S)
        yield started
        waiting = started.spares()
        started.kill()
        wait_until(lambda: all(state(pid) in ("", "Z") for pid in waiting), "the spares' end")


@pytest.fixture
def bench(tmp_path: Path, zygote: Zygote) -> Iterator[Bench]:
    before = len(descriptors(os.getpid()))
    with ExitStack() as resources:
        yield Bench(resources, tmp_path)
    assert len(descriptors(os.getpid())) == before


def finish(vmm: VmmHandle) -> None:
    vmm.kill()
    vmm.wait_exit(DEADLINE_S)


def spare(zygote: Zygote, bench: Bench) -> int:
    """The one spare there is, of `bench`'s usual size; it is ready."""
    finish(bench.launch(HLT_FOREVER))
    (pid,) = zygote.wait_for_spares(1)
    return pid


class Launch:
    """In a thread of its own."""

    def __init__(self, bench: Bench, code: bytes) -> None:
        self._made: list[VmmHandle] = []
        self._thread = threading.Thread(target=lambda: self._made.append(bench.launch(code)))
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> VmmHandle:
        self._thread.join(DEADLINE_S)
        return self._made[0]


def test_the_second_machine_of_a_size_has_been_made_ready(zygote: Zygote, bench: Bench) -> None:
    first = bench.launch(SPIN)
    (ready,) = zygote.wait_for_spares(1)
    assert first.pid != ready
    vmm = bench.launch(say(b"hello\n") + RESET + HLT_FOREVER)
    assert vmm.pid == ready
    assert vmm.wait_exit(DEADLINE_S).reason == "guest_reset"
    assert bench.console == b"hello\n"
    assert f"vmm {ready}: ended: guest_reset" in bench.log
    assert zygote.wait_for_spares(1) != [ready], "and there is another one"
    finish(first)


def test_it_has_nothing_that_another_vmm_has_not(zygote: Zygote, bench: Bench) -> None:
    plain = bench.launch(SPIN)
    (ready,) = zygote.wait_for_spares(1)
    vmm = bench.launch(SPIN)
    assert vmm.pid == ready
    assert kinds(vmm.pid) == kinds(plain.pid)
    for pid in (plain.pid, vmm.pid):
        folder = Path(f"/proc/{pid}")
        assert (parent(pid), os.getsid(pid), os.getpriority(os.PRIO_PROCESS, pid)) == (
            *(zygote.pid, pid),
            os.getpriority(os.PRIO_PROCESS, 0),
        )
        line = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert (line[-1], (folder / "comm").read_text()) == (b"vmcell-vmm", "vmcell-vmm\n")
    networks = [os.readlink(f"/proc/{pid}/ns/net") for pid in (plain.pid, vmm.pid)]
    if os.geteuid() == 0:
        assert len({*networks, os.readlink("/proc/self/ns/net")}) == 3
    for started in (plain, vmm):
        finish(started)


def test_a_spare_has_no_descriptor_of_the_zygotes_or_of_another_machine(
    zygote: Zygote, bench: Bench
) -> None:
    running = bench.launch(SPIN, vsock=VsockConfig(guest_cid=3))
    (ready,) = zygote.wait_for_spares(1)
    zygotes = Path(f"/proc/{zygote.pid}/fd")
    # And the empty root, which all its VMMs have.
    shared = {os.readlink(zygotes / str(fd)) for fd in range(3)} | {"/", *empty_root(ready)}
    mine = descriptors(ready)
    assert set(mine) & set(descriptors(zygote.pid)) <= shared
    assert not set(mine) & set(descriptors(running.pid)) - {"/dev/null", *anonymous(mine)}
    finish(running)


def kinds(pid: int) -> list[str]:
    """Its descriptors, without what tells one socket, pipe or page map from another."""
    mine = (link.replace(f"/proc/{pid}/", "/proc/PID/") for link in descriptors(pid))
    return sorted(link.split(":[")[0] for link in mine)


def empty_root(pid: int) -> list[str]:
    return [link for link in descriptors(pid) if link.startswith("mnt:[")]


def anonymous(links: list[str]) -> list[str]:
    return [link for link in links if link.startswith("anon_inode:")]


def test_a_saved_machine_goes_on_in_a_spare(zygote: Zygote, bench: Bench, tmp_path: Path) -> None:
    """With images, a disk and vsock, and of two vCPUs."""
    with tempfile.TemporaryFile() as image, tempfile.TemporaryFile() as disk:
        image.truncate(HUGE_PAGE_BYTES + 5000)
        disk.truncate(1 << 20)
        fields = {
            "vcpu_count": 2,
            "pmem": (PmemConfig(descriptor=2),),
            "blk": (BlkConfig(descriptor=3),),
            "vsock": VsockConfig(guest_cid=7, listen_ports=(1024,)),
            "spare_windows": 3,
            "balloon": True,
        }
        fds = (image.fileno(), disk.fileno())
        # movw $0x3f8, %dx; xor %al, %al; 1: out %al, %dx; inc %al; jmp 1b
        vmm = bench.launch(b"\x66\xba\xf8\x03\x30\xc0\xee\xfe\xc0\xeb\xfb", *fds, **fields)
        snapshot = None
        for number in range(3):
            bench.wait_console(lambda more: len(more) > 100, len(bench.console))
            vmm.pause()
            snapshot = bench.save(vmm, tmp_path / str(number), base=snapshot)
            finish(vmm)
            (ready,) = zygote.wait_for_spares(1)
            vmm = bench.restore(snapshot, *fds, **fields)
            assert vmm.pid == ready
            length = len(bench.console)
            with pytest.raises(TimeoutError):
                vmm.wait_exit(0.05)
            assert len(bench.console) == length, "it stands still until it is told to go on"
            vmm.resume()
        bench.wait_console(lambda more: len(more) > 100, len(bench.console))
        finish(vmm)
    assert bench.console == bytes(n & 0xFF for n in range(len(bench.console)))


@pytest.mark.parametrize(
    "fields", [{"vcpu_count": 2}, {"memory_mib": 128}, {"spare_windows": 1}], ids=str
)
def test_a_machine_of_another_size_gets_a_vmm_of_its_own(
    zygote: Zygote, bench: Bench, fields: dict[str, object]
) -> None:
    ready = spare(zygote, bench)
    vmm = bench.launch(SPIN, **fields)
    assert (vmm.pid != ready, parent(vmm.pid)) == (True, zygote.pid)
    assert ready in zygote.wait_for_spares(2)
    finish(vmm)


def test_one_killed_while_it_makes_itself_ready_is_not_missed(zygote: Zygote, bench: Bench) -> None:
    running = bench.launch(SPIN)
    wait_until(lambda: len(children(zygote.pid)) == 2, "a spare at work")
    (making,) = set(children(zygote.pid)) - {running.pid}
    end(making)
    finish(running)
    vmm = bench.launch(SPIN)
    assert parent(vmm.pid) == zygote.pid
    zygote.wait_for_spares(1)
    finish(vmm)


def test_one_killed_while_it_waits_is_not_missed(zygote: Zygote, bench: Bench) -> None:
    """Whether the zygote has noticed, or finds it out with a request in its hands."""
    for noticed in (True, False):
        ready = spare(zygote, bench)
        with zygote.paused():
            end(ready)
            launch = None if noticed else Launch(bench, SPIN)
        if launch is None:
            zygote.hello()
        vmm = bench.launch(SPIN) if launch is None else launch.result()
        assert (vmm.pid != ready, parent(vmm.pid)) == (True, zygote.pid)
        finish(vmm)


def test_one_killed_when_it_has_been_handed_over_is_replaced_by_the_direct_way(
    zygote: Zygote, bench: Bench
) -> None:
    ready = spare(zygote, bench)
    os.kill(ready, signal.SIGSTOP)
    wait_until(lambda: state(ready) == "T", "the stop")
    launch = Launch(bench, SPIN)
    wait_until(lambda: len(zygote.spares()) == 2, "another one in its place")
    assert not launch.is_over
    end(ready)
    vmm = launch.result()
    assert parent(vmm.pid) == os.getpid()
    finish(vmm)


def test_one_that_hangs_is_given_up_and_then_does_nothing(
    zygote: Zygote, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a machine that is restored, whose order has reached it before it could answer."""
    vmm = bench.launch(say(b"x\n") + SPIN)
    bench.wait_console(lambda more: more == b"x\n")
    vmm.pause()
    snapshot = bench.save(vmm, tmp_path / "snapshot")
    finish(vmm)
    (ready,) = zygote.wait_for_spares(1)
    os.kill(ready, signal.SIGSTOP)
    wait_until(lambda: state(ready) == "T", "the stop")
    monkeypatch.setattr(zygote_client, "FORKED_WITHIN_S", 0.5)
    began = time.monotonic()
    vmm = bench.restore(snapshot)
    assert time.monotonic() - began >= 0.5
    assert parent(vmm.pid) == os.getpid()
    os.kill(ready, signal.SIGCONT)
    wait_until(lambda: state(ready) in ("", "Z"), "its end")
    assert f"vmm {ready}" not in bench.log
    vmm.resume()
    finish(vmm)


def test_handed_over_it_outlives_the_zygote(zygote: Zygote, bench: Bench) -> None:
    ready = spare(zygote, bench)
    vmm = bench.launch(SPIN)
    assert vmm.pid == ready
    zygote.kill()
    with pytest.raises(TimeoutError):
        vmm.wait_exit(0.2)
    finish(vmm)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_one_that_waits_ends_with_the_zygote(
    zygote: Zygote, bench: Bench, number: signal.Signals
) -> None:
    ready = spare(zygote, bench)
    zygote.signal(number)
    zygote.wait()
    wait_until(lambda: state(ready) in ("", "Z"), "the spare's end")


def test_one_at_work_ends_with_the_zygote(zygote: Zygote, bench: Bench) -> None:
    running = bench.launch(SPIN)
    wait_until(lambda: len(children(zygote.pid)) == 2, "a spare at work")
    (making,) = set(children(zygote.pid)) - {running.pid}
    zygote.kill()
    wait_until(lambda: state(making) in ("", "Z"), "the spare's end")
    finish(running)


def test_a_renewed_zygote_has_spares_of_its_own(zygote: Zygote, bench: Bench) -> None:
    ready = spare(zygote, bench)
    zygote.signal(signal.SIGHUP)
    wait_until(lambda: state(ready) in ("", "Z"), "the old spare's end")
    wait_until(lambda: "renewed" in zygote.log.read_text(), "the renewal")
    (later,) = zygote.wait_for_spares(1)
    vmm = bench.launch(SPIN)
    assert vmm.pid == later != ready
    finish(vmm)


def test_ten_one_after_the_other_leave_nothing(zygote: Zygote, bench: Bench) -> None:
    before = len(zygote.descriptors())
    spare(zygote, bench)
    for _ in range(10):
        (ready,) = zygote.wait_for_spares(1)
        vmm = bench.launch(HLT_FOREVER)
        assert vmm.pid == ready
        finish(vmm)
    zygote.wait_for_spares(1)
    assert len(children(zygote.pid)) == 1
    assert len(zygote.descriptors()) == before + 1, "the socket to the spare"


def test_where_there_can_be_none_it_is_tried_once_for_each_request(
    zygote: Zygote, bench: Bench
) -> None:
    """A machine that no VM could be made for: KVM takes no slot so long."""
    with tempfile.TemporaryFile() as image:
        image.truncate(1 << 43)
        for count in (1, 2):
            with pytest.raises(VmcellError):
                bench.launch(SPIN, image.fileno(), pmem=(PmemConfig(descriptor=2),))
            wait_until(
                lambda count=count: zygote.log.read_text().count("cannot have a spare") == count,
                "the reason",
            )
            wait_until(lambda: children(zygote.pid) == [], "the spare's end")
    assert zygote.hello().number == zygote.pid


def test_its_memory_is_bounded(zygote: Zygote, bench: Bench) -> None:
    """Printed with `-s`. It has rehearsed, so it has pages that another VMM may never touch."""
    plain = bench.launch(HLT_FOREVER)
    (ready,) = zygote.wait_for_spares(1)
    waiting = memory_kib(ready)
    vmm = bench.launch(HLT_FOREVER)
    rows = {"plain": memory_kib(plain.pid), "waiting": waiting, "used": memory_kib(vmm.pid)}
    for name, row in rows.items():
        print(name, {key: row[key] for key in ("Rss", "Pss", "Private_Dirty")})  # noqa: T201
    for name in ("waiting", "used"):
        assert rows[name]["Private_Dirty"] < rows["plain"]["Private_Dirty"] + 2048, rows
    for started in (plain, vmm):
        finish(started)
