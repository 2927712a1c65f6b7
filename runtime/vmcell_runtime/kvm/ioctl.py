"""The one ioctl of this package.

The kernel trusts a request number: given a shorter buffer it reads or writes past its end, and the
interpreter dies or, worse, goes on. So a buffer shorter than its request is a ValueError and no
system call. KVM_RUN does not come through here: for it EINTR is a message, not an error.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from vmcell_protos.errors import HostError
from vmcell_runtime.kvm.abi import FLEXIBLE_ENTRY_BYTES, REQUEST_NAMES, request_size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_libc.ioctl.restype = ctypes.c_int

Buffer = ctypes.Structure | bytearray


def kvm_ioctl(fd: int, request: int, argument: int | Buffer = 0) -> int:
    """The result of one request; HostError names the request that failed.

    `argument` is a number for requests without a struct, else a buffer at least as long as the
    kernel will touch, counting the entries a flexible struct declares.
    """
    if isinstance(argument, int):
        if request_size(request):
            raise ValueError(f"{_name(request)} takes a buffer, not the number {argument}")
    else:
        _check_buffer(request, memoryview(argument).cast("B"))
    try:
        if isinstance(argument, int) and argument > 0x7FFFFFFF:
            return _ioctl_number(fd, request, argument)
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise HostError(f"{_name(request)} failed: {error.strerror}") from error


def _ioctl_number(fd: int, request: int, argument: int) -> int:
    # fcntl.ioctl takes a C int only; guest addresses above 2 GiB need the full register.
    result: int = _libc.ioctl(fd, request, argument)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _check_buffer(request: int, view: memoryview) -> None:
    needed = request_size(request)
    if not needed:
        raise ValueError(f"{_name(request)} takes a number, not a buffer")
    entry_bytes = FLEXIBLE_ENTRY_BYTES.get(request)
    if entry_bytes is not None and len(view) >= needed:
        needed += int.from_bytes(view[:4], "little") * entry_bytes
    if len(view) < needed:
        raise ValueError(f"{_name(request)} needs {needed} bytes, the buffer has {len(view)}")


def _name(request: int) -> str:
    return REQUEST_NAMES.get(request, f"ioctl {request:#x}")
