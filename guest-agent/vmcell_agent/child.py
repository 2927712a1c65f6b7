"""The life of a forked child up to execve: a container's init, or a process added to it.

Everything that is needed is in memory before the fork: once the child has left the guest's own
file system it can import nothing. A child never returns into the agent's loop; whatever goes wrong
is told over the report channel and ends it.
"""

from __future__ import annotations

import os
import socket

from vmcell_agent import (
    abi,
    containerfs,
    copyin,
    credentials,
    forked,
    program,
    report,
    syscalls,
    terminal,
)
from vmcell_agent.attempt import attempt
from vmcell_agent.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vmcell_agent.ociprocess import ProcessSpec
    from vmcell_agent.ocispec import ContainerSpec
    from vmcell_protos.agent import FileCopy

CONTAINER_NAMESPACES = abi.CLONE_NEWNS | abi.CLONE_NEWUTS | abi.CLONE_NEWIPC | abi.CLONE_NEWCGROUP
_NULL_DEVICE = os.makedev(1, 3)


class Stdio(Record):
    """Descriptors that become 0, 1 and 2; with a terminal they are replaced by its slave."""

    stdin: int
    stdout: int
    stderr: int
    terminal: bool
    rows: int = 0
    columns: int = 0


class Launch(Record):
    """What every child needs."""

    process: ProcessSpec
    stdio: Stdio
    channel: socket.socket  # the child's end of the report channel
    cgroup_procs: int  # "0" written here moves the child into the container's cgroup


class InitLaunch(Record):
    """What a container's init needs beside that."""

    spec: ContainerSpec
    root: str
    root_read_only: bool
    files: list[FileCopy]
    shared_namespaces: int  # CLONE_NEW* of those that are the pod's
    pid_namespace: int  # pidfd of the pod's holder; -1: a new one for this container
    shared_memory: str  # the pod's tmpfs for mounts of type vmcell-shm
    live_share: str  # the pod's share for mounts of type virtiofs
    boot_id: str  # the file that is to be the container's boot id
    # Runs instead of a program when set: envd. Imported before the fork's file system changes.
    load_builtin: Callable[[], Callable[[Callable[[], None]], NoReturn]] | None


def run_init(launch: Launch, init: InitLaunch) -> NoReturn:
    """Become the container's init. The caller has forked into a new pid namespace."""
    with report.last_words(launch.channel):
        _prepare(launch)
        if init.shared_namespaces & abi.CLONE_NEWPID:
            _hide()
        builtin = init.load_builtin() if init.load_builtin is not None else None
        with attempt("make the container's namespaces"):
            syscalls.unshare(CONTAINER_NAMESPACES & ~init.shared_namespaces)
        _build(init, launch)
        credentials.become(launch.process)
        if builtin is None:
            program.become(launch.process.args, _environment(launch.process))
        syscalls.set_process_name("envd")
        os.environ.clear()
        os.environ.update(_environment(launch.process))
        builtin(lambda: _ready(launch.channel))
    os._exit(report.EXIT_NOT_STARTED)


def run_added(launch: Launch, init_pidfd: int) -> NoReturn:
    """Become a process beside the init, into whose pid namespace the caller has forked."""
    with report.last_words(launch.channel):
        _prepare(launch, init_pidfd)
        _hide()
        with attempt("join the container's namespaces", code="failed_precondition"):
            syscalls.setns(init_pidfd, CONTAINER_NAMESPACES)
        os.close(init_pidfd)
        if launch.stdio.terminal:
            _open_terminal(launch)
        _enter_directory(launch.process.cwd)
        _own_stdio(launch)
        credentials.become(launch.process)
        program.become(launch.process.args, _environment(launch.process))
    os._exit(report.EXIT_NOT_STARTED)


def _prepare(launch: Launch, *keep: int) -> None:
    """Default signals, own session, standard streams, nothing else of the agent's left open."""
    forked.reset()
    with attempt("set up standard streams"):
        for target, fd in enumerate((launch.stdio.stdin, launch.stdio.stdout, launch.stdio.stderr)):
            os.dup2(fd, target, inheritable=True)
    forked.close_all_but(0, 1, 2, launch.channel.fileno(), launch.cgroup_procs, *keep)
    with attempt("join the container's cgroup"):
        os.write(launch.cgroup_procs, b"0")
        os.close(launch.cgroup_procs)
    if launch.process.oom_score_adj is not None:
        credentials.set_oom_score(launch.process.oom_score_adj)


def _hide() -> None:
    """Until execve this process is the agent's copy: who is in its namespaces must not look in."""
    syscalls.prctl(abi.PR_SET_DUMPABLE, 0)


def _build(init: InitLaunch, launch: Launch) -> None:
    """The container's view of the system, ending in its working directory."""
    spec = init.spec
    with attempt("open the container's mount namespace"):
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    trees = containerfs.clone_trees(
        spec.mounts, shared_memory=init.shared_memory, live_share=init.live_share
    )
    with attempt("take the guest's boot id"):
        boot_id = syscalls.clone_tree(init.boot_id)
    containerfs.enter_root(init.root, spec.root_propagation)
    read_only_mounts = containerfs.mount_all(spec.mounts, trees)
    containerfs.make_devices(spec.devices)
    _tell_copies(launch.channel, init.files, copyin.copy_in(init.files), namespace)
    if not init.shared_namespaces & abi.CLONE_NEWUTS:
        _name(spec)
    containerfs.write_sysctls(spec.sysctls)
    containerfs.cover_boot_id(boot_id)
    if launch.stdio.terminal:
        containerfs.bind_console(_open_terminal(launch))
    with attempt(f"make working directory {launch.process.cwd}"):
        containerfs.make_directory(launch.process.cwd)
    containerfs.lock_down(spec, read_only_mounts, root_read_only=init.root_read_only)
    _enter_directory(launch.process.cwd)
    _own_stdio(launch)


def _name(spec: ContainerSpec) -> None:
    with attempt(f"set hostname {spec.hostname!r}"):
        if spec.hostname:
            socket.sethostname(spec.hostname)
        if spec.domainname:
            syscalls.setdomainname(spec.domainname)


def _tell_copies(
    channel: socket.socket, files: list[FileCopy], targets: list[str], namespace: int
) -> None:
    """The mount namespace outlives this process in the agent's hands, for what is read and written
    later; where a file is not at the path that was asked for, that is told too."""
    for index, (file, target) in enumerate(zip(files, targets, strict=True)):
        if target != file.destination:
            report.send_target(channel, index, target)
    report.send_namespace(channel, namespace)
    os.close(namespace)


def _open_terminal(launch: Launch) -> str:
    """Terminal as standard streams and controlling terminal; its master goes to the agent."""
    master, slave, path = terminal.open_pair()
    if launch.stdio.rows or launch.stdio.columns:
        terminal.set_size(master, launch.stdio.rows, launch.stdio.columns)
    report.send_master(launch.channel, master)
    os.close(master)
    for target in range(3):
        os.dup2(slave, target, inheritable=True)
    os.close(slave)
    terminal.make_controlling(0)
    return path


def _enter_directory(cwd: str) -> None:
    with attempt(f"enter working directory {cwd}", code="invalid_argument"):
        os.chdir(cwd)


def _own_stdio(launch: Launch) -> None:
    """Let the user open /dev/stdout and the like; the null device stays root's."""
    with attempt("own the standard streams"):
        for fd in range(3):
            if os.fstat(fd).st_rdev != _NULL_DEVICE:
                os.fchown(fd, launch.process.uid, -1)


def _environment(process: ProcessSpec) -> dict[str, str]:
    if process.env.get("HOME"):
        return process.env
    return {**process.env, "HOME": credentials.home_directory(process.uid)}


def _ready(channel: socket.socket) -> None:
    """envd listens: tell the agent once, then nothing of the channel is left in the container."""
    report.send_ready(channel)
    channel.close()
