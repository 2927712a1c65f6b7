"""A VMM forked by the zygote is a VMM like any other, but for whose child it is."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from payload import HLT_FOREVER, RESET, SPIN, elf, memory_file, say
from zygote_harness import Zygote, children, descriptors, memory_kib, parent, state, variant

from vmcell_protos.errors import CallerError
from vmcell_runtime import handle as handle_module
from vmcell_runtime import zygote_client
from vmcell_runtime.config import MachineConfig
from vmcell_runtime.handle import VmmHandle, launch

pytestmark = pytest.mark.kvm

DEADLINE_S = 30
COUNT = 10


@pytest.fixture
def zygote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zygote]:
    """One that takes this process for a shim of its own installation."""
    with tempfile.TemporaryDirectory(prefix="vmcell-z") as folder:
        started = Zygote(f"{folder}/z")
        started.start()
        installation = started.hello().output
        monkeypatch.setenv("VMCELL_ZYGOTE", started.path)
        monkeypatch.setattr(zygote_client, "installation", lambda: installation)
        yield started
        started.kill()


class Shim:
    """Launches payloads; its log and console are files."""

    def __init__(self, resources: ExitStack, folder: Path) -> None:
        self._resources = resources
        self._folder = folder
        self.log_fd = self._open("vmm.log")
        self._console_fd = self._open("console.log")

    def _open(self, name: str) -> int:
        fd = os.open(self._folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self._resources.callback(os.close, fd)
        return fd

    def launch(self, code: bytes) -> VmmHandle:
        config = MachineConfig(
            vcpu_count=1, memory_mib=64, kernel_descriptor=0, console_descriptor=1
        )
        kernel_fd = memory_file(elf(code))
        try:
            vmm = launch(config, [kernel_fd, self._console_fd], log_fd=self.log_fd)
        finally:
            os.close(kernel_fd)
        self._resources.callback(vmm.close)
        return vmm

    @property
    def log(self) -> str:
        return (self._folder / "vmm.log").read_text()

    @property
    def console(self) -> bytes:
        return (self._folder / "console.log").read_bytes()


@pytest.fixture
def shim(tmp_path: Path, zygote: Zygote) -> Iterator[Shim]:
    before = len(descriptors(os.getpid()))
    with ExitStack() as resources:
        yield Shim(resources, tmp_path)
    assert len(descriptors(os.getpid())) == before


def test_its_guest_runs_and_its_end_has_a_reason(zygote: Zygote, shim: Shim) -> None:
    vmm = shim.launch(say(b"hello\n") + RESET + HLT_FOREVER)
    assert vmm.wait_exit(DEADLINE_S).reason == "guest_reset"
    assert shim.console == b"hello\n"
    assert f"vmm {vmm.pid}: ended: guest_reset" in shim.log
    assert children(zygote.pid) == [], "reaped by the kernel"


def test_it_is_the_zygotes_child_with_nothing_of_it(zygote: Zygote, shim: Shim) -> None:
    vmm = shim.launch(SPIN)
    assert parent(vmm.pid) == zygote.pid
    assert os.getsid(vmm.pid) == vmm.pid
    line = Path(f"/proc/{vmm.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert line[-1] == b"vmcell-vmm"
    mine = descriptors(vmm.pid)
    assert not set(mine) & set(descriptors(zygote.pid)) - {"/dev/null"}
    assert "/dev/kvm" not in mine
    assert any("kvm-vm" in name for name in mine)
    status = Path(f"/proc/{vmm.pid}/status").read_text()
    ignored = int(status.split("SigIgn:\t")[1].split()[0], 16)
    # Without glibc's own, 32 and 33, which nobody can set and make leaves ignored to its children.
    assert ignored & ~(3 << 31) == 0x1001000, "as Python has it: PIPE and XFSZ"


def test_killed_it_is_said_to_be(shim: Shim) -> None:
    vmm = shim.launch(SPIN)
    os.kill(vmm.pid, signal.SIGTERM)
    assert vmm.wait_exit(DEADLINE_S).reason == "killed"


def test_a_machine_that_cannot_be_made_is_the_same_error(shim: Shim) -> None:
    config = MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0)
    with tempfile.TemporaryFile() as file, pytest.raises(CallerError, match="64-bit ELF"):
        launch(config, [file.fileno()], log_fd=shim.log_fd)


def test_a_shim_that_talks_nonsense_ends_it(shim: Shim) -> None:
    """An exception of its main thread goes the VMM's way out, not the zygote's."""
    vmm = shim.launch(SPIN)
    vmm._sock.send(b"nonsense")
    ended = vmm.wait_exit(DEADLINE_S)
    assert ended.reason == "vmm_error"
    assert "CallerError" in ended.detail
    assert "Traceback" in shim.log


def test_it_ends_with_its_shims_socket(shim: Shim) -> None:
    vmm = shim.launch(SPIN)
    began = time.monotonic()
    vmm.close()
    assert time.monotonic() - began < handle_module.CLOSE_TIMEOUT_S
    assert state(vmm.pid) == ""


def test_it_outlives_the_zygote(zygote: Zygote, shim: Shim) -> None:
    vmm = shim.launch(SPIN)
    zygote.kill()
    with pytest.raises(TimeoutError):
        vmm.wait_exit(0.2)
    later = shim.launch(SPIN)
    assert parent(later.pid) == os.getpid(), "started without it"
    vmm.kill()
    assert vmm.wait_exit(DEADLINE_S).reason == "killed"


def test_a_zygote_that_hangs_is_done_without(zygote: Zygote, shim: Shim) -> None:
    with zygote.paused():
        began = time.monotonic()
        vmm = shim.launch(SPIN)
        elapsed_s = time.monotonic() - began
        assert parent(vmm.pid) == os.getpid()
        assert elapsed_s >= zygote_client.FORKED_WITHIN_S
    zygote.hello()
    assert children(zygote.pid) == [], "the one it was asked for has nobody to serve"


def test_another_installation_is_done_without(
    zygote: Zygote, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote_client, "installation", lambda: b"another")
    assert parent(shim.launch(SPIN).pid) == os.getpid()
    assert "another installation" in zygote.log.read_text()


def test_a_child_that_is_given_up_ends(
    zygote: Zygote, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer comes too late; the other end of its socket is closed by then."""
    monkeypatch.setattr(zygote_client.VmmFork, "forked", lambda _: None)
    vmm = shim.launch(SPIN)
    assert parent(vmm.pid) == os.getpid()
    deadline = time.monotonic() + DEADLINE_S
    while children(zygote.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    zygote.hello()
    assert children(zygote.pid) == []


def test_ten_at_once_across_a_renewal(zygote: Zygote, shim: Shim) -> None:
    first = [shim.launch(SPIN) for _ in range(5)]
    zygote.signal(signal.SIGHUP)
    second = [shim.launch(SPIN) for _ in range(5)]
    assert len({vmm.pid for vmm in first + second}) == 10
    assert not any(parent(vmm.pid) == os.getpid() for vmm in first + second)
    for vmm in first + second:
        pidfd = os.pidfd_open(vmm.pid)
        vmm.kill()
        readable, _, _ = select.select([pidfd], [], [], DEADLINE_S)
        os.close(pidfd)
        assert readable
        assert vmm.wait_exit(DEADLINE_S).reason == "killed"


def test_it_costs_less_than_an_interpreter(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed with `-s`: time to the first vCPU's run, and memory, of ten machines each."""
    medians: dict[str, dict[str, float]] = {}
    for way in ("zygote", "direct"):
        if way == "direct":
            monkeypatch.setenv("VMCELL_ZYGOTE", "")
        times, vmms = [], []
        for _ in range(COUNT):
            began = time.perf_counter()
            vmms.append(shim.launch(HLT_FOREVER))
            times.append((time.perf_counter() - began) * 1000)
        rows = {"launch p50 ms": times}
        for row in ("Private_Dirty", "Pss"):
            rows[f"{row} KiB"] = [memory_kib(vmm.pid)[row] for vmm in vmms]
        medians[way] = {name: sorted(values)[COUNT // 2] for name, values in rows.items()}
        for vmm in vmms:
            vmm.close()
    sys.stdout.write(f"\n{medians}, n = {COUNT}, {os.cpu_count()} CPUs\n")
    for name, value in medians["zygote"].items():
        assert value < medians["direct"][name], name


def test_it_is_jailed_as_any_other(
    zygote: Zygote, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one zygote's share an empty root, which none can change, and nothing else."""
    monkeypatch.setattr(zygote_client, "FORKED_WITHIN_S", DEADLINE_S)
    vmms = [shim.launch(SPIN) for _ in range(3)]
    uids = set()
    for vmm in vmms:
        status = Path(f"/proc/{vmm.pid}/status").read_text()
        for line in ("Seccomp:\t2", "NoNewPrivs:\t1", "Groups:\t \n", "CapEff:\t0000000000000000"):
            assert line in status, line
        assert "CapBnd:\t0000000000000000" in status
        uids.add(status.split("Uid:\t")[1].split()[0])
        assert os.listdir(f"/proc/{vmm.pid}/root") == os.listdir(f"/proc/{vmm.pid}/cwd") == []
        assert "mnt:[" not in "".join(descriptors(vmm.pid)), "the way in is closed"
        (mount,) = Path(f"/proc/{vmm.pid}/mountinfo").read_text().splitlines()
        assert mount.split()[4] == "/"
        assert mount.split()[5].startswith("ro,")
    assert len(uids) == 3
    for name, count in (("mnt", 1), ("net", 3), ("ipc", 3), ("uts", 3)):
        found = {os.readlink(f"/proc/{vmm.pid}/ns/{name}") for vmm in vmms}
        assert len(found) == count, name
        assert os.readlink(f"/proc/{zygote.pid}/ns/{name}") not in found, name


def test_a_renewed_zygote_makes_a_root_anew(
    zygote: Zygote, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote_client, "FORKED_WITHIN_S", DEADLINE_S)
    before = shim.launch(SPIN)
    zygote.signal(signal.SIGHUP)
    deadline = time.monotonic() + DEADLINE_S
    while "renewed" not in zygote.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    after = [shim.launch(SPIN) for _ in range(2)]
    assert {parent(vmm.pid) for vmm in after} == {zygote.pid}, zygote.log.read_text()
    roots = [os.readlink(f"/proc/{vmm.pid}/ns/mnt") for vmm in (before, *after)]
    assert roots[1] == roots[2] != roots[0]


def test_a_zygote_without_a_root_says_so_and_each_makes_its_own(
    zygote: Zygote, shim: Shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote_client, "FORKED_WITHIN_S", DEADLINE_S)
    zygote.kill()
    change = (
        "from vmcell_protos.errors import HostError; from vmcell_runtime import jail; "
        "jail.make_empty_root = lambda: (_ for _ in ()).throw(HostError('no root today'))"
    )
    second = Zygote(zygote.path, variant(tmp_path / "binary", change))
    second.start()
    try:
        installation = second.hello().output
        monkeypatch.setattr(zygote_client, "installation", lambda: installation)
        assert "its VMMs make their roots by themselves: no root today" in second.log.read_text()
        vmms = [shim.launch(SPIN) for _ in range(2)]
        assert {parent(vmm.pid) for vmm in vmms} == {second.pid}
        assert len({os.readlink(f"/proc/{vmm.pid}/ns/mnt") for vmm in vmms}) == 2
        assert [os.listdir(f"/proc/{vmm.pid}/root") for vmm in vmms] == [[], []]
    finally:
        second.kill()
