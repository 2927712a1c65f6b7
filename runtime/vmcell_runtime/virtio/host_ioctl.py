"""ioctl on TAP and vhost descriptors, checked like the one for KVM.

`fcntl.ioctl` copies a short argument into a buffer of 1024 bytes of its own, so the kernel never
touches an object of ours. What is longer than that, or shorter than the kernel will read, does not
get there: by the size in the request, and by what a struct with a count of entries says itself.
"""

from __future__ import annotations

import fcntl

from vmcell_protos.errors import HostError
from vmcell_runtime.virtio import host_abi

MAX_ARGUMENT_BYTES = 1024
FLEXIBLE_ENTRY_BYTES = {host_abi.VHOST_SET_MEM_TABLE: host_abi.vhost_memory_region.size}
"""Requests whose struct begins with a count of entries that follow it, and how long one is."""

_SIZE_MASK = 0x3FFF


def ioctl_bytes(fd: int, request: int, argument: bytes, what: str) -> bytes:
    """One request with a struct; the struct as the kernel left it. HostError says `what` failed."""
    size = request >> 16 & _SIZE_MASK
    size += FLEXIBLE_ENTRY_BYTES.get(request, 0) * int.from_bytes(argument[:4], "little")
    if not size <= len(argument) <= MAX_ARGUMENT_BYTES:
        raise ValueError(f"{what}: request {request:#x} takes {size} bytes, not {len(argument)}")
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise HostError(f"{what} failed: {error.strerror}") from error


def ioctl_number(fd: int, request: int, argument: int, what: str) -> None:
    """One request whose argument is passed by value."""
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise HostError(f"{what} failed: {error.strerror}") from error
