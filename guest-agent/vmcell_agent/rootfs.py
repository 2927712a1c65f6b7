"""A container's root: EROFS below (DAX from pmem), ext4 or tmpfs above, overlayfs over both; or one
ext4 disk that is the whole root.

Without a disk for writes the upper layer is a small tmpfs: mount points and copied-in files can
still be made, and the root is made read-only before the container's program starts. A whole-root
disk that is to be read-only is a lower layer in the same way, so nothing is ever written to it.
"""

from __future__ import annotations

import errno
import os
import re

from vmcell_agent import abi, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmcell_protos.agent import Rootfs

_LOWER_DEVICE = re.compile(r"pmem[0-9]{1,2}", re.ASCII)
_DISK = re.compile(r"vd[a-z]", re.ASCII)
_SCRATCH_OPTIONS = "mode=755,size=16m"


class RootFilesystem:
    """The mounts below `directory`; `path` is the merged root. `close` undoes all of them."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = f"{directory}/root"
        self.writable = False
        self.upper = ""  # the overlay's directory for writes, where it lies on a disk
        self._user_xattrs = False
        self._made: list[str] = []
        self._mounted: list[str] = []

    def mount(
        self,
        rootfs: Rootfs,
        device_directory: str,
        *,
        read_only: bool,
        user_xattrs: bool = False,
    ) -> None:
        """Mount it; `read_only`: the container is to have it so; `user_xattrs`: the overlay keeps
        its notes where a container can read them. Raises CallerError or HostError, and leaves
        nothing behind then."""
        _check(rootfs)
        self._user_xattrs = user_xattrs
        disk = rootfs.block_device
        self.writable = bool(rootfs.upper_device or disk)
        try:
            if disk and not read_only:
                self._make(self.directory, self.path)
                self._mount_disk(f"{device_directory}/{disk}", self.path)
            elif disk:
                self._mount_layers([(f"{device_directory}/{disk}", "ext4", "")], "")
            else:
                lowers = [(f"{device_directory}/{name}", "erofs", "dax=always")
                          for name in rootfs.lower_devices]  # fmt: skip
                upper = rootfs.upper_device
                self._mount_layers(lowers, f"{device_directory}/{upper}" if upper else "")
        except BaseException:
            self.close()
            raise

    def _make(self, *directories: str) -> None:
        with attempt(f"make {self.directory}"):
            for directory in directories:
                os.mkdir(directory, 0o755)
                self._made.append(directory)

    def _mount_layers(self, layers: Sequence[tuple[str, str, str]], upper_disk: str) -> None:
        """An overlay of `layers` (source, file system, data), the topmost first, and a disk."""
        upper = f"{self.directory}/upper"
        names = [f"lower{number}" for number in range(len(layers))]
        self._make(
            self.directory, *(f"{self.directory}/{name}" for name in names), upper, self.path
        )
        for name, (source, fstype, data) in zip(names, layers, strict=True):
            self._mount(source, f"{self.directory}/{name}", fstype, abi.MS_RDONLY, data)
        if upper_disk:
            self._mount_disk(upper_disk, upper)
            self.upper = f"{upper}/upper"
        else:
            self._mount("tmpfs", upper, "tmpfs", 0, _SCRATCH_OPTIONS)
        with attempt(f"make overlay directories in {upper}"):
            for directory in (f"{upper}/upper", f"{upper}/work"):
                os.makedirs(directory, 0o755, exist_ok=True)
        data = f"lowerdir={':'.join(names)},upperdir=upper/upper,workdir=upper/work"
        if self._user_xattrs:
            data += ",userxattr"
        # Many long paths would be more than the page that mount(2) takes.
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(self.directory)
            self._mount("overlay", self.path, "overlay", 0, data)
        finally:
            os.fchdir(here)
            os.close(here)

    def _mount_disk(self, device: str, target: str) -> None:
        """An ext4 that nobody else has mounted: two roots on one disk would destroy each other."""
        with attempt(f"open {device}"):
            try:
                os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise CallerError(
                    f"{device} is in use by another container", code="failed_precondition"
                ) from error
        self._mount(device, target, "ext4", abi.MS_NOATIME, "")

    def _mount(self, source: str, target: str, fstype: str, flags: int, data: str) -> None:
        with attempt(f"mount {source} as {fstype} on {target}"):
            syscalls.mount(source, target, fstype, flags, data)
        self._mounted.append(target)

    def close(self) -> None:
        """Unmount and remove the directories; idempotent. Raises HostError when it cannot."""
        while self._mounted:
            target = self._mounted[-1]
            with attempt(f"unmount {target}"):
                _unmount(target)
            self._mounted.pop()
        while self._made:
            with attempt(f"remove {self._made[-1]}"):
                os.rmdir(self._made[-1])
            self._made.pop()


def _check(rootfs: Rootfs) -> None:
    """Raise CallerError for names and combinations that cannot be."""
    lowers, upper, disk = rootfs.lower_devices, rootfs.upper_device, rootfs.block_device
    for name in lowers:
        if not _LOWER_DEVICE.fullmatch(name):
            raise CallerError(f"rootfs.lower_devices has {name!r}; it must be pmem0 to pmem99")
    if len(set(lowers)) != len(lowers):
        raise CallerError(f"rootfs.lower_devices names one device twice: {', '.join(lowers)}")
    if upper and not _DISK.fullmatch(upper):
        raise CallerError(f"rootfs.upper_device is {upper!r}; it must be vda to vdz")
    if disk and not _DISK.fullmatch(disk):
        raise CallerError(f"rootfs.block_device is {disk!r}; it must be vda to vdz")
    if disk and (lowers or upper):
        raise CallerError(
            f"rootfs.block_device {disk} is a whole root; no other device goes with it"
        )
    if not disk and not lowers:
        raise CallerError("rootfs.lower_devices is empty; a root needs at least one image")


def _unmount(target: str) -> None:
    try:
        syscalls.umount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # The last reference may be a namespace the kernel is still taking down.
        syscalls.umount(target, abi.MNT_DETACH)
