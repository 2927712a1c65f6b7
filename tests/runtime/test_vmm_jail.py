"""The jail from outside, on living VMMs; and from inside, by acts that a VMM must not manage.

The acts are tried by a VMM with a hook of the test's (tests/support/forbidden_acts.py), in the same
jail: nothing of it is in what is shipped.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, run

import pytest
from forbidden_acts import ACTS
from payload import HLT_FOREVER, RESET, SPIN, load32, say, say_virtualisation
from vmm_bench import DEADLINE_S, Bench, vmm_bench

from vmcell_runtime import handle as handle_module
from vmcell_runtime import jail
from vmcell_runtime.config import BlkConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import VmmHandle
from vmcell_runtime.vmm_uid import DEFAULT_RANGE

pytestmark = pytest.mark.kvm

COUNT = 20
MAX_OPEN = 25
SUPPORT = str(Path(__file__).resolve().parents[1] / "support")
NAMESPACES = ("ipc", "mnt", "net", "uts")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with vmm_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def disk() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        yield file.fileno()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limits(pid: int) -> dict[str, tuple[str, str]]:
    rows = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {row[:26].strip(): (row[26:47].strip(), row[47:68].strip()) for row in rows}


def kinds(pid: int) -> list[str]:
    """What each of its descriptors is, by number."""
    folder = Path(f"/proc/{pid}/fd")
    return [os.readlink(folder / name) for name in sorted(os.listdir(folder), key=int)]


def on_the_list(kind: str, files: set[str]) -> bool:
    """docs/security.md: what a VMM may have open."""
    return (
        kind in ("/dev/null", "/run/vmcell/vmm-uids", "anon_inode:kvm-vm")
        or kind in ("anon_inode:[eventpoll]", "anon_inode:[eventfd]")
        or kind.startswith(("socket:[", "anon_inode:kvm-vcpu:"))
        or (kind.startswith("/proc/") and kind.endswith("/pagemap"))
        or kind in files
    )


def test_twenty_machines_are_jailed(bench: Bench, disk: int) -> None:
    vmms = [
        bench.launch(
            say_virtualisation() + say(b"x\n") + HLT_FOREVER,
            disk,
            blk=(BlkConfig(descriptor=2),),
            vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
        )
        for _ in range(COUNT)
    ]
    bench.wait_console(lambda text: text.count(b"x") >= COUNT)
    shown = (bench.console.count(b"0"), bench.console.count(b"1"))
    assert shown == (COUNT, 0), "no guest is shown how to make guests"
    files = {os.readlink(f"/proc/self/fd/{fd}") for fd in (bench.console_fd, bench.log_fd, disk)}
    uids = set()
    for vmm in vmms:
        found = status(vmm.pid)
        assert (found["Seccomp"], found["NoNewPrivs"], found["Groups"]) == ("2", "1", "")
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(found[name], 16) == 0, name
        assert len(set(found["Uid"].split())) == 1
        assert found["Uid"] == found["Gid"]
        uids.add(int(found["Uid"].split()[0]))
        assert os.listdir(f"/proc/{vmm.pid}/root") == []
        assert os.listdir(f"/proc/{vmm.pid}/cwd") == []
        opened = kinds(vmm.pid)
        assert len(opened) <= MAX_OPEN, opened
        assert not [kind for kind in opened if not on_the_list(kind, files)]
    assert len(uids) == COUNT
    assert all(DEFAULT_RANGE.first <= uid < sum(DEFAULT_RANGE) for uid in uids)


def test_every_thread_has_the_filter(bench: Bench) -> None:
    vmm = bench.launch(say(b"x\n") + SPIN, vcpu_count=4)
    bench.wait_console(bool)
    threads = [int(name) for name in os.listdir(f"/proc/{vmm.pid}/task")]
    assert len(threads) >= 5
    for thread in threads:
        lines = Path(f"/proc/{vmm.pid}/task/{thread}/status").read_text()
        if "kvm-nx" not in lines:  # KVM's own, of newer kernels: it makes no system calls
            assert "Seccomp:\t2\n" in lines
        assert "NoNewPrivs:\t1\n" in lines


def test_its_world_is_empty(bench: Bench) -> None:
    vmm = bench.launch(SPIN)
    for name in NAMESPACES:
        theirs = os.readlink(f"/proc/{vmm.pid}/ns/{name}")
        assert theirs != os.readlink(f"/proc/self/ns/{name}"), name
    (mount,) = Path(f"/proc/{vmm.pid}/mountinfo").read_text().splitlines()
    before, _, after = mount.partition(" - ")
    assert after.split()[0] == "tmpfs"
    assert before.split()[3:5] == ["/", "/"]
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(before.split()[5].split(","))
    devices = Path(f"/proc/{vmm.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]


def test_it_is_bounded_and_secret(bench: Bench, disk: int) -> None:
    vmm = bench.launch(SPIN, disk, blk=(BlkConfig(descriptor=2),))
    found = limits(vmm.pid)
    assert found["Max core file size"] == ("0", "0")
    assert found["Max open files"] == (str(jail.MAX_DESCRIPTORS),) * 2
    assert found["Max processes"] == (str(jail.MAX_THREADS),) * 2
    assert found["Max file size"] == (str((64 << 20) + jail.OTHER_FILES_BYTES),) * 2
    data = 2 * (64 << 20) + jail.OWN_MEMORY_BYTES
    assert found["Max data size"] == (str(data),) * 2
    # What is not dumpable belongs to root in /proc, whoever it is.
    assert Path(f"/proc/{vmm.pid}/maps").stat().st_uid == 0
    uid = int(status(vmm.pid)["Uid"].split()[0])
    assert uid != 0
    program = f"import os; os.setuid({uid}); open('/proc/{vmm.pid}/maps').read()"
    twin = run([sys.executable, "-c", program], stderr=PIPE, check=False, timeout=60)
    assert b"PermissionError" in twin.stderr, "another VMM with the same uid could not either"


def test_a_disk_bounds_how_long_a_file_may_be(bench: Bench) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 30)
        vmm = bench.launch(SPIN, file.fileno(), blk=(BlkConfig(descriptor=2),))
        assert limits(vmm.pid)["Max file size"][0] == str((1 << 30) + jail.OTHER_FILES_BYTES)
    plugged = bench.launch(SPIN, spare_windows=1)
    assert limits(plugged.pid)["Max file size"][0] == "unlimited", "a disk of any size may come"


def test_a_full_machine_has_nothing_off_the_list(bench: Bench, disk: int) -> None:
    """One descriptor for each interrupt line, device and vCPU."""
    with ExitStack() as files:
        images = [files.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        for image in images:
            image.truncate(2 << 20)
        vmm = bench.launch(
            say(b"x\n") + SPIN,
            disk,
            *(image.fileno() for image in images),
            blk=(BlkConfig(descriptor=2),),
            pmem=(PmemConfig(descriptor=3), PmemConfig(descriptor=4)),
            vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
            balloon=True,
            vcpu_count=2,
        )
        names = [bench.console_fd, bench.log_fd, disk, *(image.fileno() for image in images)]
        known = {os.readlink(f"/proc/self/fd/{fd}") for fd in names}
        opened = kinds(vmm.pid)
    assert not [kind for kind in opened if not on_the_list(kind, known)]
    assert len(opened) <= 30, opened


# From inside


def attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, act: str, thread: str = "loop", more: str = ""
) -> VmmHandle:
    """A VMM that tries `act` once its guest may run; `more` changes it before that."""
    hook = f"; sys.path.insert(0, {SUPPORT!r}); import forbidden_acts as f; f.arm({act!r}, "
    bootstrap = BOOTSTRAP.replace("; main(", f"{hook}{thread!r}); {more}main(")
    monkeypatch.setattr(handle_module, "_BOOTSTRAP", bootstrap)
    return bench.launch(load32(0x2000_0000) + RESET + HLT_FOREVER)


BOOTSTRAP = handle_module._BOOTSTRAP
REFUSED = {"open-write", "open-read", "open-proc"}


@pytest.mark.parametrize("act", ACTS)
def test_a_forbidden_act_is_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    ended = attempt(bench, monkeypatch, act).wait_exit(DEADLINE_S)
    assert "DONE" not in bench.log
    if act in REFUSED:
        assert f"act {act}: refused, errno 1\n" in bench.log
        assert ended.reason == "guest_reset", "and the guest goes on"
        return
    assert ended == ("killed", f"signal {int(signal.SIGSYS)} ended the VMM")
    if act != "x32":
        # Where it was.
        assert "forbidden_acts.py" in bench.log
        assert "Stack (most recent call first)" in bench.log
        assert len(bench.log) < 20_000, "once"


@pytest.mark.parametrize("act", ["socket-inet", "mmap-exec", "fork"])
def test_a_vcpus_thread_is_stopped_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    ended = attempt(bench, monkeypatch, act, "vcpu").wait_exit(DEADLINE_S)
    assert ended == ("killed", f"signal {int(signal.SIGSYS)} ended the VMM")
    assert "in mmio" in bench.log


STOPPED_TWICE = (
    *("exec", "open-read", "open-write", "open-proc", "mount", "umount", "pivot-root", "chroot"),
    *("kill", "tgkill-other", "reboot", "setuid", "process-vm-readv", "process-vm-writev"),
)


@pytest.mark.parametrize("act", STOPPED_TWICE)
def test_without_the_filter_the_rest_of_the_jail_stops_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    unsealed = "import vmcell_runtime.vmm as v; v.seal = lambda: None; "
    ended = attempt(bench, monkeypatch, act, more=unsealed).wait_exit(DEADLINE_S)
    by_name = ("exec", "open-read", "open-write", "open-proc")
    code = errno.ENOENT if act in by_name else errno.EPERM
    assert f"act {act}: refused, errno {code}\n" in bench.log
    assert ended.reason == "guest_reset"


@pytest.mark.parametrize("act", ["mmap-exec", "mprotect-exec", "socket-unix", "memfd", "dumpable"])
def test_without_the_filter_the_act_is_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """So that the tests above have something to stop."""
    unsealed = "import vmcell_runtime.vmm as v; v.seal = lambda: None; "
    attempt(bench, monkeypatch, act, more=unsealed).wait_exit(DEADLINE_S)
    assert f"act {act}: DONE\n" in bench.log


def test_a_traceback_reaches_the_log_through_the_filter(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BOOTSTRAP.replace(
        "; main(", "; import vmcell_runtime.vcpu as v; v.VcpuThread._mmio = lambda s: 1 // 0; main("
    )
    monkeypatch.setattr(handle_module, "_BOOTSTRAP", broken)
    ended = bench.launch(load32(0x2000_0000) + SPIN).wait_exit(DEADLINE_S)
    assert ended.reason == "vmm_error"
    assert "Traceback (most recent call last)" in bench.log
    assert "ZeroDivisionError" in bench.log
    assert "vcpu.py" in bench.log


# Where it cannot be whole


def test_a_user_who_is_not_root_is_told_what_is_missing(tmp_path: Path) -> None:
    """In a process of another uid, which has what it needs as descriptors."""
    uid = sum(DEFAULT_RANGE) + 7
    program = tmp_path / "user.py"
    program.write_text(
        f"""
import os, sys
sys.path[:0] = {sys.path!r}
from payload import HLT_FOREVER, RESET, elf, memory_file, say
import vmcell_runtime.handle as handle
from vmcell_runtime.config import MachineConfig
kvm = os.open("/dev/kvm", os.O_RDWR)
os.setresgid({uid}, {uid}, {uid}); os.setgroups([]); os.setresuid({uid}, {uid}, {uid})
handle.open_kvm = lambda: os.dup(kvm)
config = MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0)
kernel = memory_file(elf(HLT_FOREVER))
vmm = handle.launch(config, [kernel], log_fd=1)
print(open(f"/proc/{{vmm.pid}}/status").read(), flush=True)
vmm.close()
"""
    )
    out = tmp_path / "out"
    os.chmod(tmp_path, 0o755)
    with out.open("wb") as file:
        command = [sys.executable, "-B", program]
        run(command, stdout=file, stderr=file, check=False, timeout=60)
    text = out.read_text()
    assert "not started by root: in no uid, namespaces and root directory of its own" in text
    assert "Seccomp:\t2" in text
    assert "NoNewPrivs:\t1" in text
