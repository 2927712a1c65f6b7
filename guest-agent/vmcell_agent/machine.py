"""The guest as a machine: what PID 1 mounts first, clock, entropy, host name, and the reset."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import time

from vmcell_agent import abi, cgroup, network, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError

AGENT_VERSION = "0.1.0"
CGROUP_MOUNT = "/sys/fs/cgroup"
CGROUP_ROOT = "/sys/fs/cgroup/vmcell"
STATE_DIRECTORY = "/run/vmcell"
DEVICE_DIRECTORY = "/dev"
SYSFS_DIRECTORY = "/sys"
MAX_ENTROPY_BYTES = 4096

_SAFE = abi.MS_NOSUID | abi.MS_NODEV | abi.MS_NOEXEC
# (file system, where, flags, data); the base image is read-only and holds the directories that are
# not on a mount made before.
_MOUNTS = (
    ("proc", "/proc", _SAFE, ""),
    ("sysfs", "/sys", _SAFE, ""),
    ("devtmpfs", "/dev", abi.MS_NOSUID | abi.MS_NOEXEC, "mode=0755"),
    ("devpts", "/dev/pts", abi.MS_NOSUID | abi.MS_NOEXEC, "mode=0620,ptmxmode=0666,gid=5"),
    ("tmpfs", "/dev/shm", abi.MS_NOSUID | abi.MS_NODEV, "mode=1777"),
    ("mqueue", "/dev/mqueue", _SAFE, ""),
    ("tmpfs", "/run", abi.MS_NOSUID | abi.MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", abi.MS_NOSUID | abi.MS_NODEV, "mode=1777"),
    ("cgroup2", CGROUP_MOUNT, _SAFE, "nsdelegate,memory_recursiveprot"),
)
_OOM_NEVER = "-1000"
_OPEN_FILES = (65_536, 1_048_576)  # soft; hard: the kernel's fs.nr_open


def prepare() -> None:
    """Everything PID 1 needs before it can serve; raises HostError naming the step."""
    _keep_standard_descriptors()
    for fstype, path, flags, data in _MOUNTS:
        _mount(fstype, path, flags, data)
    cgroup.enable_controllers(CGROUP_MOUNT)
    with attempt(f"make {CGROUP_ROOT}"):
        os.mkdir(CGROUP_ROOT, 0o755)
    cgroup.enable_controllers(CGROUP_ROOT)
    _write(f"{CGROUP_ROOT}/pids.max", str(_task_limit()))
    os.makedirs(STATE_DIRECTORY, 0o700, exist_ok=True)
    _write("/proc/self/oom_score_adj", _OOM_NEVER)
    # The kernel starts init with 1024; containers whose spec says nothing inherit this one.
    with attempt("raise the limit of open files"):
        resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    network.loopback_up()


def _task_limit() -> int:
    """Tasks that all containers may have: an eighth stays for the agent, so that it can fork
    whatever a fork bomb does."""
    limits = []
    for name in ("threads-max", "pid_max"):
        with attempt(f"read kernel.{name}"), open(f"/proc/sys/kernel/{name}") as file:
            limits.append(int(file.read()))
    return min(limits) * 7 // 8


def _keep_standard_descriptors() -> None:
    """Without a console the kernel starts init with 0, 1 and 2 closed; no pipe may land there."""
    while (fd := os.open("/", os.O_RDONLY | os.O_DIRECTORY)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)


def _mount(fstype: str, path: str, flags: int, data: str) -> None:
    """Mount unless the kernel (DEVTMPFS_MOUNT) or the init script did."""
    if os.path.ismount(path):
        return
    with attempt(f"mount {fstype} on {path}"):
        if not os.path.isdir(path):
            os.mkdir(path, 0o755)
        syscalls.mount(fstype, path, fstype, flags, data)


def _write(path: str, value: str) -> None:
    with attempt(f"write {value} to {path}"):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


def kernel_boot_ms() -> int:
    """When this process, PID 1 of a guest, started (field 22 of proc(5)'s stat, in ticks)."""
    with attempt("read /proc/self/stat"), open("/proc/self/stat", "rb") as file:
        # The command's name may hold spaces; fields are counted behind its bracket.
        started = int(file.read().rpartition(b")")[2].split()[19])
    return started * 1000 // os.sysconf("SC_CLK_TCK")


def set_clock(unix_time_ns: int) -> None:
    """Set the wall clock; a time before 2020 is a mistake, not a date."""
    if unix_time_ns < 1_577_836_800_000_000_000:
        raise CallerError(f"unix_time_ns is {unix_time_ns}, before the year 2020")
    with attempt("set the clock"):
        time.clock_settime_ns(time.CLOCK_REALTIME, unix_time_ns)


def set_hostname(name: str) -> None:
    if not 0 < len(name.encode()) <= 64:
        raise CallerError(f"hostname has {len(name.encode())} bytes; it must have 1 to 64")
    with attempt(f"set hostname {name!r}"):
        socket.sethostname(name)


def add_entropy(entropy: bytes) -> None:
    """Credit all bits to the kernel's pool and let the generator take them at once (random(4))."""
    if len(entropy) > MAX_ENTROPY_BYTES:
        raise CallerError(f"entropy has {len(entropy)} bytes; at most {MAX_ENTROPY_BYTES}")
    info = abi.RAND_POOL_INFO.pack(len(entropy) * 8, len(entropy)) + entropy
    with attempt("credit entropy"):
        fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, abi.RNDADDENTROPY, info)
            fcntl.ioctl(fd, abi.RNDRESEEDCRNG)
        finally:
            os.close(fd)


def reset() -> None:
    """Sync and reset the machine; the VMM takes the reset as the end."""
    os.sync()
    syscalls.reboot()
