"""ioctl on TAP and vhost descriptors, checked like the one for KVM.

`fcntl.ioctl` copies a short argument into a buffer of 1024 bytes of its own, so the kernel never
touches an object of ours; what is longer than that, or than its request says, does not get there.
"""

from __future__ import annotations

import fcntl

from vmcell_protos.errors import HostError

MAX_ARGUMENT_BYTES = 1024
_SIZE_MASK = 0x3FFF


def ioctl_bytes(fd: int, request: int, argument: bytes, what: str) -> bytes:
    """One request with a struct; the struct as the kernel left it. HostError says `what` failed."""
    size = request >> 16 & _SIZE_MASK
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
