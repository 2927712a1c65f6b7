"""What a VMM is asked to build for a sandbox: paths and numbers become a `MachineConfig` and the
descriptors it names.

The base image is always the first pmem device, the images of a container that the VM is booted for
follow, its writable disk or root device is the first disk. A VM for a pod has none of these, but
spare windows into which they are plugged later.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmcell_protos.errors import HostError
from vmcell_runtime.config import (
    BlkConfig,
    FsConfig,
    MachineConfig,
    NetConfig,
    PmemConfig,
    VsockConfig,
)
from vmcell_runtime.vmm_uid import DEFAULT_RANGE, UidRange
from vmcell_shim.disk import open_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.agent import Interface
    from vmcell_shim.snapshot_store import OpenSnapshot

CONTROL_PORT, STREAM_PORT, FORWARD_PORT = 1024, 1025, 1026
# Every VM has a vsock of its own, so all guests may have the same number.
GUEST_CID = 3
SHARE_TAG = "vmcell"
COMMAND_LINE = (
    "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/usr/sbin/vmcell-init "
    "console=ttyS0 loglevel=4 panic=-1"
)


@dataclass(frozen=True, kw_only=True)
class NetPort:
    """One interface of the guest. `open` gives a TAP's descriptor, the caller's to close."""

    open: Callable[[], int]
    mac: str
    mtu: int
    interface: Interface


@dataclass(frozen=True, kw_only=True)
class GuestShape:
    """What to boot: paths on the host, sizes, and what the guest is told about itself.

    `images` beside the base image, `disk` "" for none, `share` opens a connected socket to a
    file system daemon. With `saved` nothing is booted: the guest goes on from there. Its VMM is
    one of `uids`.
    """

    kernel: str
    base_image: str
    images: tuple[str, ...]
    disk: str
    vcpus: int
    memory_mib: int
    spare_windows: int
    nets: tuple[NetPort, ...]
    share: Callable[[], int] | None
    hostname: str
    sysctls: dict[str, str]
    console_log: str
    vmm_log: str
    saved: OpenSnapshot | None = None
    uids: UidRange = DEFAULT_RANGE


def machine_config(shape: GuestShape, descriptors: list[int]) -> MachineConfig:
    """The VMM's configuration; opens every file it names and appends it to `descriptors`, which
    the caller closes, also after an error. Raises HostError."""

    def opened(path: str, flags: int, hint: str = "") -> int:
        return added(open_file(path, flags, hint))

    def added(fd: int) -> int:
        descriptors.append(fd)
        return len(descriptors) - 1

    setup = "; run `vmcell setup`"
    kernel = opened(shape.kernel, os.O_RDONLY, setup)
    console = opened(shape.console_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    pmem = [PmemConfig(descriptor=opened(shape.base_image, os.O_RDONLY, setup))]
    pmem += [PmemConfig(descriptor=opened(image, os.O_RDONLY)) for image in shape.images]
    blk = [BlkConfig(descriptor=added(open_disk(shape.disk)))] if shape.disk else []
    net = [
        NetConfig(tap_descriptor=added(port.open()), mac=port.mac, mtu=port.mtu)
        for port in shape.nets
    ]
    fs = [FsConfig(descriptor=added(shape.share()), tag=SHARE_TAG)] if shape.share else []
    return MachineConfig(
        vcpu_count=shape.vcpus,
        memory_mib=shape.memory_mib,
        kernel_descriptor=kernel,
        command_line=COMMAND_LINE,
        pmem=tuple(pmem),
        blk=tuple(blk),
        net=tuple(net),
        fs=tuple(fs),
        vsock=VsockConfig(guest_cid=GUEST_CID, listen_ports=(CONTROL_PORT,)),
        balloon=True,
        spare_windows=shape.spare_windows,
        console_descriptor=console,
    )


def open_file(path: str, flags: int, hint: str = "") -> int:
    """A descriptor of `path`; HostError with `hint` what to do."""
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}{hint}") from error
