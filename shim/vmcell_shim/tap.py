"""TAP interfaces as descriptors for the VMM: one an annotation names, or a new one.

Source: linux/if_tun.h, Documentation/networking/tuntap.
"""

from __future__ import annotations

import fcntl
import os

from vmcell_protos.errors import HostError
from vmcell_runtime.virtio.host_abi import (
    IFF_NO_PI,
    IFF_TAP,
    IFF_TUN_EXCL,
    IFF_VNET_HDR,
    IFREQ,
    INT,
    TUNSETIFF,
    TUNSETVNETHDRSZ,
)

# struct virtio_net_hdr_v1, with num_buffers (virtio 1.2 § 5.1.6).
_HEADER_BYTES = 12


def open_tap(name: str) -> int:
    """A descriptor attached to the existing TAP `name`; the caller closes it. Raises HostError.

    Attaching to a name that does not exist would make a new, unconnected one; that is refused.
    """
    if not os.path.exists(f"/sys/class/net/{name}/tun_flags"):
        raise HostError(
            f"TAP {name!r} does not exist in the host's network namespace; make it before the "
            "container, with vnet_hdr on",
            code="failed_precondition",
        )
    return _attach(name, 0)


def make_tap(name: str) -> int:
    """A descriptor of a new TAP in the calling thread's network namespace; the caller closes it.

    The interface lives as long as the descriptor and what is duplicated from it. Raises HostError,
    also when there is an interface of that name.
    """
    return _attach(name, IFF_TUN_EXCL)


def _attach(name: str, flags: int) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        try:
            request = IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags)
            fcntl.ioctl(fd, TUNSETIFF, request)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, INT.pack(_HEADER_BYTES))
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        raise HostError(f"cannot attach to TAP {name!r}: {error}") from error
    return fd
