"""The life of a dev VM: up, down, and what is known about it.

`up` leaves three processes behind (QEMU and a virtiofsd per share) and returns when containerd
answers inside. Whatever fails on the way, none of them stays.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.kvm.host_kind import host_kind
from vmcell_shim import virtiofsd
from vmcell_tools import dev_ssh, dev_sync
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.dev_config import vm_configuration
from vmcell_tools.dev_image import (
    GUEST_API_PORT,
    GUEST_DATA_PORT,
    host_kvm_driver,
    initramfs,
)
from vmcell_tools.dev_kernel import find_kernel
from vmcell_tools.dev_qemu import (
    ACCELERATORS,
    QEMU,
    Forward,
    Machine,
    Share,
    qemu_command,
    virtiofsd_command,
)
from vmcell_tools.dev_seed import seed
from vmcell_tools.dev_state import (
    DevVm,
    ProcessId,
    load,
    locked,
    recorded_processes,
    state_directory,
)
from vmcell_tools.dev_store import Store, check_key, opened_store
from vmcell_tools.progress import Progress

CONSOLE_PREFIX = "vmcell-dev: "
CONSOLE_LINES_ON_FAILURE = 40
FLUSH_DEADLINE_S = 15
MEMORY_MIB_RANGE = range(1024, 262145)


class SilentConsole(HostError):
    """A VM on the software CPU that did not get to its first line; seen in some dozens of boots."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `vmcell dev up` was asked for; ports of 0 mean any free one."""

    name: str
    accelerator: str
    cpu_count: int
    memory_mib: int
    api_port: int
    data_port: int
    deadline_s: float
    lifetime_s: int
    store: str | None = None
    images: tuple[str, ...] = ()


def up(request: Request, progress: Progress) -> tuple[DevVm, bool]:
    """The running VM of that name, started when needed; the flag tells whether it was started."""
    _check(request)
    with locked(request.name, wait_s=request.deadline_s):
        running = _loaded(request.name)
        if running is not None and running.ready and running.qemu.alive():
            return running, False
        _end(request.name)
        _check_ports(request)
        return _start(request, progress), True


def down(name: str) -> bool:
    """End the VM and all its processes; False when there was none."""
    with locked(name, wait_s=60):
        processes = recorded_processes(name)
        was_running = any(process.alive() for process in processes)
        _end(name)
        return was_running


def running_vm(name: str) -> DevVm:
    """The VM when it is up; a HostError that says what to do otherwise."""
    vm = load(name)
    option = "" if name == "default" else f" --name {name}"
    if vm is None or not vm.ready:
        raise HostError(f"dev VM {name!r} is not up; run: vmcell dev up{option}")
    if not vm.qemu.alive():
        tail = console_tail(vm.console_log)
        raise HostError(
            f"dev VM {name!r} has ended; run: vmcell dev up{option}; its console ended with:"
            f"\n{tail}"
        )
    return vm


def console_tail(path: Path) -> str:
    """The last lines of a console log; a sentence when there is none."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return f"(no console log at {path})"
    lines = text.replace("\r", "").splitlines()[-CONSOLE_LINES_ON_FAILURE:]
    return "\n".join(lines) or "(nothing was printed)"


def _check(request: Request) -> None:
    if os.geteuid() != 0:
        raise CallerError("vmcell dev needs root to share / with the VM; run it with sudo")
    if request.accelerator not in ("auto", *ACCELERATORS):
        raise CallerError(f"accelerator {request.accelerator!r} is not auto, kvm, tcg or icount")
    if request.memory_mib not in MEMORY_MIB_RANGE:
        raise CallerError(
            f"memory of {request.memory_mib} MiB is outside {MEMORY_MIB_RANGE.start} to"
            f" {MEMORY_MIB_RANGE.stop - 1}"
        )
    state_directory(request.name)
    if request.store is not None:
        check_key(request.store)
    elif request.images:
        raise CallerError("--image puts images on a disk, which --store KEY names")


def _check_ports(request: Request) -> None:
    for port in (request.api_port, request.data_port):
        if port and not _port_is_free(port):
            raise CallerError(
                f"port {port} of 127.0.0.1 is in use; choose others with --api-port and"
                " --data-port (0 takes a free one)"
            )


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; QEMU fails clearly if one is taken before it binds."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _start(request: Request, progress: Progress) -> DevVm:
    directory = state_directory(request.name)
    out = directory / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with opened_store(request.store, progress) as store:
        if store is not None and request.images:
            seed(store, request.images, BuildCache.default(), progress)
        machine, ssh_port = _prepare(request, directory, store, progress)
        deadline = time.monotonic() + request.deadline_s
        boot = partial(_boot, machine, directory, ssh_port, store, progress)
        first_line_by = time.monotonic() + request.deadline_s / 3
        try:
            return boot(deadline, first_line_by)
        except SilentConsole as error:
            progress.note(f"{error}; starting it once more")
            return boot(deadline, deadline)


def _boot(
    machine: Machine,
    directory: Path,
    ssh_port: int,
    store: Store | None,
    progress: Progress,
    deadline: float,
    first_line_by: float,
) -> DevVm:
    out = directory / "out"
    progress.step(f"starting QEMU ({machine.accelerator}, {machine.memory_mib} MiB)")
    with ExitStack() as on_failure:
        helpers = []
        for share in machine.shares:
            share.socket.unlink(missing_ok=True)
            command = virtiofsd_command(_virtiofsd(), share)
            helpers.append(_spawn(command, out / f"virtiofsd-{share.tag}.log"))
            on_failure.callback(helpers[-1].end, grace_s=2)
            _wait_for_socket(share.socket, helpers[-1], out, deadline)
        inherited = () if store is None else (store.lock,)
        qemu = _spawn(qemu_command(machine), out / "qemu.log", inherited)
        on_failure.callback(qemu.end, grace_s=2)
        vm = DevVm(
            name=machine.name,
            directory=directory,
            qemu=qemu,
            helpers=tuple(helpers),
            ssh_port=ssh_port,
            api_port=machine.forwards[1].host_port,
            data_port=machine.forwards[2].host_port,
            memory_mib=machine.memory_mib,
            accelerator=machine.accelerator,
            has_store=store is not None,
            ready=False,
        )
        vm.save()
        progress.step("booting the kernel")
        _wait_until_ready(vm, deadline, first_line_by, progress)
        progress.step("connecting")
        on_failure.callback(dev_ssh.close_connection, directory)
        dev_ssh.open_connection(directory, ssh_port)
        vm = replace(vm, ready=True)
        vm.save()
        on_failure.pop_all()
    return vm


def _prepare(
    request: Request, directory: Path, store: Store | None, progress: Progress
) -> tuple[Machine, int]:
    """Everything that needs no process: kernel, keys, initramfs, free ports."""
    if shutil.which(QEMU) is None:
        raise HostError(f"{QEMU} is missing; apt-get install qemu-system-x86")
    accelerator = request.accelerator
    if accelerator == "auto":
        accelerator = "kvm" if nested_kvm_works() else "tcg"
    kernel = find_kernel(progress)
    progress.step("making the initramfs")
    configuration = vm_configuration(progress)
    dev_sync.remember(directory, dev_sync.take_manifest(configuration))
    archive = initramfs(
        name=request.name,
        kernel=kernel,
        keys=dev_ssh.make_keys(directory),
        kvm_driver=host_kvm_driver() if accelerator == "kvm" else "kvm-amd",
        memory_mib=request.memory_mib,
        lifetime_s=request.lifetime_s,
        copy_logs=accelerator != "icount",
        files=configuration,
    )
    initramfs_path = directory / "initramfs.cpio"
    initramfs_path.write_bytes(archive)
    ssh_port, api_port, data_port = _free_ports(3)
    forwards = (
        Forward(host_port=ssh_port, guest_port=22),
        Forward(host_port=request.api_port or api_port, guest_port=GUEST_API_PORT),
        Forward(host_port=request.data_port or data_port, guest_port=GUEST_DATA_PORT),
    )
    out = directory / "out"
    machine = Machine(
        name=request.name,
        accelerator=accelerator,
        cpu_count=request.cpu_count,
        memory_mib=request.memory_mib,
        kernel=kernel.vmlinuz,
        initramfs=initramfs_path,
        console_log=out / "console.log",
        shares=(
            Share(tag="rootfs", source=Path("/"), socket=directory / "root.sock", cache="always"),
            Share(tag="out", source=out, socket=directory / "out.sock", cache="auto"),
        ),
        forwards=forwards,
        store=None if store is None else store.path,
    )
    return machine, ssh_port


def nested_kvm_works() -> bool:
    """Whether a guest of this host's KVM gets a KVM of its own."""
    if not host_kind().runs_linux:
        return False
    for module in ("kvm_amd", "kvm_intel"):
        try:
            nested = Path(f"/sys/module/{module}/parameters/nested").read_text().strip()
        except FileNotFoundError:
            continue
        return nested in ("1", "Y")
    return False


def _virtiofsd() -> str:
    for path in virtiofsd.PROGRAMS:
        if os.access(path, os.X_OK):
            return path
    raise HostError(
        f"virtiofsd is at none of {', '.join(virtiofsd.PROGRAMS)}; "
        "apt-get install qemu-system-common"
    )


def _spawn(command: Sequence[str], log: Path, inherited: Sequence[int] = ()) -> ProcessId:
    """A process that outlives this one, its words in `log`, with descriptors `inherited`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
            pass_fds=inherited,
        )
    identity = ProcessId.of(process.pid)
    # It is meant to go on without us; only the interpreter's warning about that is unwanted.
    process.returncode = 0
    return identity


def _wait_for_socket(path: Path, helper: ProcessId, out: Path, deadline: float) -> None:
    while not path.is_socket():
        if not helper.alive() or time.monotonic() > deadline:
            logs = "\n".join(log.read_text().strip() for log in out.glob("virtiofsd-*.log"))
            raise HostError(f"virtiofsd did not offer {path}:\n{logs}")
        time.sleep(0.01)


def console_steps(path: Path) -> list[str]:
    """What the VM has said of itself; a line that is still being written is not one yet."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    lines = whole.replace("\r", "").splitlines()
    return [line.partition(CONSOLE_PREFIX)[2] for line in lines if CONSOLE_PREFIX in line]


def _wait_until_ready(vm: DevVm, deadline: float, first_line_by: float, progress: Progress) -> None:
    """Follows the console: each line of our own there is a step, `ready` the last.

    Raises SilentConsole when there is none by `first_line_by`, unless that is the deadline too.
    """
    seen = 0
    while True:
        steps = console_steps(vm.console_log)
        for step in steps[seen:]:
            if step == "ready":
                return
            progress.step(step)
        seen = len(steps)
        problem = None
        if not vm.qemu.alive():
            problem = "QEMU ended"
        elif time.monotonic() > deadline:
            problem = "the deadline passed"
        elif not steps and time.monotonic() > first_line_by:
            raise SilentConsole(f"dev VM {vm.name!r} says nothing on its console")
        if problem is not None:
            tail = console_tail(vm.console_log)
            qemu_log = (vm.out_directory / "qemu.log").read_text().strip()
            raise HostError(
                f"dev VM {vm.name!r}: {problem} in step: {progress.current}; logs are in"
                f" {vm.out_directory}; QEMU said: {qemu_log or 'nothing'}; the console ended"
                f" with:\n{tail}"
            )
        time.sleep(0.05)


def _end(name: str) -> None:
    """All processes gone, the record too; logs stay until the next `up`."""
    directory = state_directory(name)
    vm = _loaded(name)
    if vm is not None and vm.has_store and vm.ready and vm.qemu.alive():
        _flush(vm)
    dev_ssh.close_connection(directory)
    for process in recorded_processes(name):
        process.end(grace_s=5)
    for file in ("state.json", "initramfs.cpio", "client_key", "host_key"):
        with suppress(FileNotFoundError):
            (directory / file).unlink()


def _loaded(name: str) -> DevVm | None:
    """The record, or None for one that only names processes."""
    try:
        return load(name)
    except HostError:
        return None


def _flush(vm: DevVm) -> None:
    """Lets the VM write its store out; a VM that does not answer is ended without."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*dev_ssh.ssh_command(vm.directory, vm.ssh_port, "-T"), "sync"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FLUSH_DEADLINE_S,
            check=False,
        )


def report(vm: DevVm) -> dict[str, object]:
    """What `vmcell dev status --json` prints."""
    return {
        "name": vm.name,
        "accelerator": vm.accelerator,
        "memory_mib": vm.memory_mib,
        "api_port": vm.api_port,
        "data_port": vm.data_port,
        "ssh_port": vm.ssh_port,
        "pid": vm.qemu.pid,
        "out": str(vm.out_directory),
    }
