"""A container's root: EROFS below (DAX from pmem), ext4 or tmpfs above, overlayfs over both.

Without a disk for writes the upper layer is a small tmpfs: mount points and copied-in files can
still be made, and the root is made read-only before the container's program starts.
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

_LOWER_DEVICE = re.compile(r"pmem[0-9]{1,2}", re.ASCII)
_UPPER_DEVICE = re.compile(r"vd[a-z]", re.ASCII)
_SCRATCH_OPTIONS = "mode=755,size=16m"


class RootFilesystem:
    """The mounts below `directory`; `path` is the merged root. `close` undoes all of them."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = f"{directory}/root"
        self.writable = False
        self._made: list[str] = []
        self._mounted: list[str] = []

    def mount(
        self, *, device_directory: str, lower_devices: Sequence[str], upper_device: str
    ) -> None:
        """Mount it, `lower_devices` topmost first; raises CallerError or HostError, and leaves
        nothing behind then."""
        for name in lower_devices:
            if not _LOWER_DEVICE.fullmatch(name):
                raise CallerError(f"rootfs.lower_devices has {name!r}; it must be pmem0 to pmem99")
        if not lower_devices:
            raise CallerError("rootfs.lower_devices is empty; a root needs at least one image")
        if upper_device and not _UPPER_DEVICE.fullmatch(upper_device):
            raise CallerError(f"rootfs.upper_device is {upper_device!r}; it must be vda to vdz")
        self.writable = bool(upper_device)
        try:
            self._mount_layers(lower_devices, upper_device, device_directory)
        except BaseException:
            self.close()
            raise

    def _mount_layers(
        self, lower_devices: Sequence[str], upper_device: str, device_directory: str
    ) -> None:
        upper = f"{self.directory}/upper"
        lowers = [f"{self.directory}/lower{number}" for number in range(len(lower_devices))]
        with attempt(f"make {self.directory}"):
            for directory in (self.directory, *lowers, upper, self.path):
                os.mkdir(directory, 0o755)
                self._made.append(directory)
        for name, lower in zip(lower_devices, lowers, strict=True):
            self._mount(f"{device_directory}/{name}", lower, "erofs", abi.MS_RDONLY, "dax=always")
        if upper_device:
            self._mount(f"{device_directory}/{upper_device}", upper, "ext4", abi.MS_NOATIME, "")
        else:
            self._mount("tmpfs", upper, "tmpfs", 0, _SCRATCH_OPTIONS)
        with attempt(f"make overlay directories in {upper}"):
            for directory in (f"{upper}/upper", f"{upper}/work"):
                os.makedirs(directory, 0o755, exist_ok=True)
        data = f"lowerdir={':'.join(lowers)},upperdir={upper}/upper,workdir={upper}/work"
        self._mount("overlay", self.path, "overlay", 0, data)

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


def _unmount(target: str) -> None:
    try:
        syscalls.umount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # The last reference may be a namespace the kernel is still taking down.
        syscalls.umount(target, abi.MNT_DETACH)
