"""How long a restore takes: the zygote is asked → the guest's first instruction.

With a spare VMM, as the zygote keeps one ready for the size that was asked for last, and without:
forked when it is asked for. The spare's own making is in neither; it happens between two requests,
and a sample waits until it has ended.

The machine has every device a sandbox has; its guest is a hand-made one, so any /dev/kvm will do.
It was saved once before, and what is measured is warm: the snapshot is in the page cache. The
guest's console is a pipe, and its first byte comes from one of its first two instructions.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import HostError, VmcellError
from vmcell_runtime.config import BlkConfig, MachineConfig, NetConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import SavedFiles, VmmHandle, launch
from vmcell_runtime.virtio.host_abi import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFREQ, TUNSETIFF
from vmcell_runtime.zygote_client import ask_for_vmm
from vmcell_tools.bench.payload import TALK, elf, memory_file
from vmcell_tools.bench.qemu_microvm import DEVICES, QemuMicrovm, missing_microvm
from vmcell_tools.bench.report import Ratio, Report
from vmcell_tools.bench.samples import Series, sample
from vmcell_tools.bench.zygote import (
    parent,
    private_zygote,
    served_by,
    spares_of,
    wait_for_spare,
)
from vmcell_tools.progress import Progress

DEADLINE_S = 60.0
BUDGET_MS = 4.0
FILES = {"base": 80 << 20, "root": 30 << 20, "disk": 64 << 20}  # two images, a disk: bytes
TAP_NAME = b"vmcbench%d"  # the kernel fills in a number


def bench_restore(count: int, memory_mib: int, progress: Progress) -> Report:
    """`count` restores with and without a spare, boots of the same machine, bare forks, by turns.

    Raises HostError when there is no /dev/kvm, the zygote does not serve, or the machine that is
    to be saved does not run.
    """
    report = Report(name="restore")
    size = f"{memory_mib} MiB, 1 vCPU, all devices, warm page cache"
    restored = _restore_series(report, "restore", f"by a spare VMM that waits; {size}")
    plain = _restore_series(report, "restore, no spare", f"by a VMM forked for it; {size}")
    boot = report.add(
        "boot", "vmcell", f"zygote asked → first guest instruction, no snapshot, no spare; {size}"
    )
    fork = report.add("fork", "vmcell", "zygote asked → pid of a VMM without a machine")
    with tempfile.TemporaryDirectory(prefix="vmcell-bench-") as name, ExitStack() as opened:
        progress.step("starting a zygote, saving a machine")
        with_spare = opened.enter_context(private_zygote(Path(name), spares=1))
        opened.enter_context(private_zygote(Path(name), spares=0))
        machines = PayloadMachines(Path(name), memory_mib, opened)
        machines.save()
        peer = _peer(Path(name), memory_mib, report)
        progress.step("restoring")
        with served_by(with_spare):
            machines.restore()  # from now on it keeps a spare of this size
        for turn in range(count):
            sample(restored, lambda: machines.restore_by_spare(with_spare))
            wait_for_spare(with_spare)  # its making is not to disturb the others
            sample(plain, machines.restore)
            sample([boot], machines.boot)
            sample([fork], machines.fork)
            for series, measure in peer:
                sample([series], measure)
            progress.count(turn + 1, count)
    report.compare("restore to one without a spare, p50", restored[0], plain[0])
    report.compare("restore without a spare to boot, p50", plain[0], boot)
    for series, _ in peer:
        if series.what == "QEMU restore":
            report.compare("restore of vmcell to QEMU microvm, p50", restored[0], series)
    value = restored[0].p50
    report.ratios.append(
        Ratio(
            what=f"restore p50 to its budget of {BUDGET_MS:g} ms",
            value=None if value is None else value / BUDGET_MS,
            bound="for 512 MiB, native",
        )
    )
    if not machines.has_tap:
        report.notes.append("left out: the network interface; its TAP needs root")
    return report.finish()


def _restore_series(report: Report, name: str, how: str) -> list[Series]:
    """Of what `PayloadMachines.restore` measures."""
    return [
        report.add(name, "vmcell", f"zygote asked → first guest instruction; {how}"),
        report.add("  build", "vmcell", f"{name}: zygote asked → devices and state are there"),
        report.add("  go on", "vmcell", f"{name}: told to go on → first guest instruction"),
    ]


def _peer(
    folder: Path, memory_mib: int, report: Report
) -> list[tuple[Series, Callable[[], tuple[float]]]]:
    """QEMU's two figures and how to take them; none, and a note, where it cannot be measured."""
    reason = missing_microvm()
    qemu = QemuMicrovm(folder, memory_mib, [folder / name for name in FILES])
    if not reason:
        try:
            qemu.save()
        except (VmcellError, OSError) as error:
            reason = str(error)
    if reason:
        report.notes.append(f"left out: QEMU microvm: {reason}")
        return []
    size = f"same guest, {memory_mib} MiB, {DEVICES}, warm page cache"
    boot = report.add(
        "QEMU boot", "QEMU microvm", f"QEMU started → first guest instruction; {size}"
    )
    restore = report.add(
        "QEMU restore", "QEMU microvm", f"the same, -incoming a saved state; {size}"
    )
    return [(boot, qemu.boot), (restore, qemu.restore)]


class PayloadMachines:
    """One machine and its snapshot, and VMMs made of either; what they use is in `folder`."""

    def __init__(self, folder: Path, memory_mib: int, opened: ExitStack) -> None:
        self._folder = folder
        self._memory_mib = memory_mib
        self._opened = opened
        self.has_tap = os.geteuid() == 0
        self._kernel = self._own(memory_file(elf(TALK)))
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._log = self._own(os.open(folder / "vmm.log", flags))
        self._files = [self._own(_file(folder / name, size)) for name, size in FILES.items()]
        self._saved: SavedFiles | None = None
        self._last_pid = 0

    def _own(self, fd: int) -> int:
        self._opened.callback(os.close, fd)
        return fd

    def save(self) -> None:
        """Makes the snapshot that `restore` is of. Raises VmcellError, TimeoutError."""
        with self._devices() as devices, self._running(devices, None) as vmm:
            vmm.resume()
            devices.first_byte()
            vmm.pause()
            memory, state = self._folder / "memory", self._folder / "state"
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fds = SavedFiles(*(self._own(os.open(path, flags, 0o600)) for path in (memory, state)))
            os.ftruncate(fds.memory_fd, self._memory_mib << 20)
            vmm.save(*fds)
            self._saved = fds

    def restore(self) -> tuple[float, float, float]:
        """Milliseconds: all, until the machine stands, from there to the first instruction."""
        with self._devices() as devices:
            began = time.perf_counter_ns()
            with self._running(devices, self._saved) as vmm:
                standing = time.perf_counter_ns()
                vmm.resume()
                devices.first_byte()
                ended = time.perf_counter_ns()
        return (ended - began) / 1e6, (standing - began) / 1e6, (ended - standing) / 1e6

    def restore_by_spare(self, zygote: str) -> tuple[float, float, float]:
        """The same by the spare VMM of the zygote at that path. HostError if another did it."""
        wait_for_spare(zygote)
        waiting = spares_of(zygote)
        with served_by(zygote):
            values = self.restore()
        if self._last_pid not in waiting:
            raise HostError("no spare VMM restored it")
        return values

    def boot(self) -> tuple[float]:
        """Milliseconds, the same way."""
        with self._devices() as devices:
            began = time.perf_counter_ns()
            with self._running(devices, None):
                devices.first_byte()
                ended = time.perf_counter_ns()
        return ((ended - began) / 1e6,)

    def fork(self) -> tuple[float]:
        """Milliseconds."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            began = time.perf_counter_ns()
            asked = ask_for_vmm(theirs.fileno(), self._log, None)
            forked = asked.forked() if asked is not None else None
            ended = time.perf_counter_ns()
        if asked is not None:
            asked.close()
        if forked is None:
            raise HostError(_NO_FORK)
        _, pidfd = forked
        try:
            _wait_readable(pidfd, "the VMM did not end with its socket")
        finally:
            os.close(pidfd)
        return ((ended - began) / 1e6,)

    @contextmanager
    def _devices(self) -> Iterator[_Devices]:
        reader, writer = os.pipe()
        fds = [self._kernel, writer, *self._files]
        taps = [_open_tap()] if self.has_tap else []
        try:
            yield _Devices(config=self._config(), descriptors=[*fds, *taps], console=reader)
        finally:
            for fd in (reader, writer, *taps):
                os.close(fd)

    def _config(self) -> MachineConfig:
        nets = (NetConfig(tap_descriptor=5, mac="02:00:00:00:00:01"),) if self.has_tap else ()
        return MachineConfig(
            vcpu_count=1,
            memory_mib=self._memory_mib,
            kernel_descriptor=0,
            console_descriptor=1,
            pmem=(PmemConfig(descriptor=2), PmemConfig(descriptor=3)),
            blk=(BlkConfig(descriptor=4),),
            net=nets,
            vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
            balloon=True,
        )

    @contextmanager
    def _running(self, devices: _Devices, saved: SavedFiles | None) -> Iterator[VmmHandle]:
        vmm = launch(devices.config, devices.descriptors, log_fd=self._log, saved=saved)
        try:
            yield vmm
            self._last_pid = vmm.pid
            if parent(vmm.pid) == os.getpid():
                raise HostError(_NO_FORK)
        finally:
            vmm.kill()
            vmm.wait_exit(DEADLINE_S)
            vmm.close()


_NO_FORK = "the zygote did not fork the VMM"


@dataclass(frozen=True, kw_only=True)
class _Devices:
    """What one machine is launched with; `console` is where its words can be read."""

    config: MachineConfig
    descriptors: list[int]
    console: int

    def first_byte(self) -> None:
        _wait_readable(self.console, "the guest said nothing")
        os.read(self.console, 1)


def _wait_readable(fd: int, otherwise: str) -> None:
    readable, _, _ = select.select([fd], [], [], DEADLINE_S)
    if not readable:
        raise TimeoutError(f"{otherwise} within {DEADLINE_S:g} s")


def _file(path: Path, size_bytes: int) -> int:
    """A sparse file with one page of content."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size_bytes)
    os.pwrite(fd, b"x" * 4096, 0)
    return fd


def _open_tap() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(TAP_NAME, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except OSError:
        os.close(fd)
        raise
    return fd
