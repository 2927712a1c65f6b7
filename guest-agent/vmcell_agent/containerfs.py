"""Turns a fresh mount namespace into the container's: pivot first, then build inside the new root.

After `enter_root` nothing of the guest's own file system can be reached by any path, so a symlink
of a hostile image resolves to a place inside the container, whatever it says. Everything here runs
in the forked child before the container's program; order as in the OCI runtime specification
(config-linux.md) and runc: mounts, devices, files, terminal, read-only and masked paths.
"""

from __future__ import annotations

import os
import stat

from vmcell_agent import abi, liveshare, syscalls
from vmcell_agent.attempt import attempt
from vmcell_agent.mountoptions import POD_SHARED_MEMORY
from vmcell_agent.ocispec import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_agent.mountoptions import Mount
    from vmcell_agent.ocispec import ContainerSpec

_DEFAULT_DEVICES = (
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
)
_DEFAULT_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
BOOT_ID = "/proc/sys/kernel/random/boot_id"
# statvfs and mount(2) give these four the same values; a remount must not lose them
_KEPT_FLAGS = abi.MS_RDONLY | abi.MS_NOSUID | abi.MS_NODEV | abi.MS_NOEXEC


def enter_root(path: str, propagation: int) -> None:
    """Make `path` the root of this (new) mount namespace and let go of the old one."""
    with attempt(f"enter root {path}"):
        syscalls.mount("", "/", "", abi.MS_REC | abi.MS_SLAVE)
        syscalls.mount(path, path, "", abi.MS_BIND | abi.MS_REC)
        os.chdir(path)
        syscalls.pivot_root(".", ".")
        # "." is the old root now, stacked on the new one
        syscalls.umount(".", abi.MNT_DETACH)
        os.chdir("/")
        syscalls.mount("", "/", "", propagation or abi.MS_PRIVATE | abi.MS_REC)


def settle(path: str) -> str:
    """`path` with every symlink resolved inside the current root, its parents made."""
    real = os.path.realpath(path)
    os.makedirs(os.path.dirname(real), mode=0o755, exist_ok=True)
    return real


def make_directory(path: str, mode: int = 0o755) -> str:
    """The directory `path`, made when missing; returns it without symlinks."""
    real = settle(path)
    try:
        os.mkdir(real, mode)
    except FileExistsError:
        if not os.path.isdir(real):
            raise
    return real


def clone_trees(
    mounts: tuple[Mount, ...], *, shared_memory: str, live_share: str
) -> dict[int, int]:
    """Copies, attached nowhere, of what lies outside the container's root: the pod's tmpfs (type
    vmcell-shm), live directories of the host (virtiofs). The directories are where each is mounted.

    Index of the mount → descriptor, for `mount_all`. Works before `enter_root` only.
    """
    with attempt("take the pod's shared memory"):
        trees = {
            index: syscalls.clone_tree(shared_memory)
            for index, row in enumerate(mounts)
            if row.fstype == POD_SHARED_MEMORY
        }
    live = [index for index, row in enumerate(mounts) if row.fstype == liveshare.FSTYPE]
    if live:
        with attempt("take the host's live directories"):
            numbers = [mounts[index].source for index in live]
            trees.update(zip(live, liveshare.clone(live_share, numbers), strict=True))
    return trees


def _attach(tree: int, destination: str, flags: int) -> str:
    """Put a copied tree in its place, which is made as what it is; the place without symlinks."""
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        target = make_directory(destination)
    else:
        target = settle(destination)
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY, 0o644))
    syscalls.attach_tree(tree, target)
    os.close(tree)
    syscalls.mount("", target, "", abi.MS_BIND | abi.MS_REMOUNT | flags)
    return target


def mount_all(mounts: tuple[Mount, ...], trees: dict[int, int]) -> list[str]:
    """Mount in order; returns the tmpfs mounts that `lock_down` has yet to make read-only."""
    later: list[str] = []
    for index, row in enumerate(mounts):
        with attempt(f"mount {row.fstype} on {row.destination} in the container"):
            if index in trees:
                target = _attach(trees[index], row.destination, row.flags)
            else:
                target = make_directory(row.destination)
                flags = row.flags
                if row.fstype == "tmpfs" and flags & abi.MS_RDONLY:
                    flags &= ~abi.MS_RDONLY
                    later.append(target)
                fstype = "cgroup2" if row.fstype == "cgroup" else row.fstype
                syscalls.mount(fstype, target, fstype, flags, row.data)
            if row.propagation:
                syscalls.mount("", target, "", row.propagation)
    return later


def _make_node(device: Device) -> None:
    target = settle(device.path)
    if os.path.lexists(target):
        os.unlink(target)
    os.mknod(target, device.mode, os.makedev(device.major, device.minor))
    os.chmod(target, stat.S_IMODE(device.mode))
    os.chown(target, device.uid, device.gid)


def make_devices(devices: tuple[Device, ...]) -> None:
    """The default devices and links of config-linux.md, then those the spec names."""
    with attempt("make the container's devices"):
        for path, major, minor in _DEFAULT_DEVICES:
            _make_node(Device(path, stat.S_IFCHR | 0o666, major, minor, 0, 0))
        for path, target in _DEFAULT_LINKS:
            if not os.path.lexists(path):
                os.symlink(target, path)
    for device in devices:
        with attempt(f"make device {device.path} in the container"):
            _make_node(device)


def bind_console(terminal_path: str) -> None:
    """Let /dev/console be the container's terminal."""
    with attempt("bind /dev/console"):
        target = settle("/dev/console")
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY, 0o600))
        syscalls.mount(terminal_path, target, "", abi.MS_BIND)


def write_sysctls(sysctls: dict[str, str]) -> None:
    """Write below /proc/sys, which must be a proc file system."""
    for name, value in sysctls.items():
        with attempt(f"set sysctl {name} to {value!r}"):
            fd = os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                if syscalls.filesystem_magic(fd) != abi.PROC_SUPER_MAGIC:
                    raise OSError(0, "/proc is no proc file system in this container")
                os.write(fd, value.encode())
            finally:
                os.close(fd)


def cover_boot_id(tree: int) -> None:
    """Let `tree`, a copy of the mount of one file, be the container's boot id, read-only; a
    container without a proc file system has none. The sysctls have been written, and /proc/sys is
    made read-only afterwards: that takes this mount along."""
    with attempt("cover the container's boot id"):
        try:
            fd = os.open(BOOT_ID, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            os.close(tree)
            return
        try:
            if syscalls.filesystem_magic(fd) == abi.PROC_SUPER_MAGIC:
                syscalls.set_tree_read_only(tree)
                syscalls.attach_tree(tree, BOOT_ID)
        finally:
            os.close(fd)
            os.close(tree)


def remount_read_only(path: str) -> None:
    """Make the mount at `path` read-only, keeping its other flags."""
    flags = os.statvfs(path).f_flag & _KEPT_FLAGS
    syscalls.mount("", path, "", abi.MS_BIND | abi.MS_REMOUNT | abi.MS_RDONLY | flags)


def bind_read_only(path: str) -> None:
    """Put a read-only view of `path` over itself."""
    syscalls.mount(path, path, "", abi.MS_BIND | abi.MS_REC)
    remount_read_only(path)


def _mask(path: str) -> None:
    if os.path.isdir(path):
        syscalls.mount("tmpfs", path, "tmpfs", abi.MS_RDONLY, "size=0k")
    else:
        syscalls.mount("/dev/null", path, "", abi.MS_BIND)


def lock_down(spec: ContainerSpec, read_only_mounts: list[str], *, root_read_only: bool) -> None:
    """Read-only paths, masked paths, read-only root; a path that does not exist is skipped."""
    for path in spec.read_only_paths:
        with attempt(f"make {path} read-only in the container"):
            if os.path.exists(path):
                bind_read_only(path)
    for path in spec.masked_paths:
        with attempt(f"mask {path} in the container"):
            if os.path.exists(path):
                _mask(path)
    with attempt("make the container's root read-only"):
        for path in read_only_mounts:
            remount_read_only(path)
        if root_read_only:
            remount_read_only("/")
