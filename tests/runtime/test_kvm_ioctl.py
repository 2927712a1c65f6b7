"""The checked ioctl: a buffer the kernel would overrun is refused before any system call (MS2).

A descriptor that is not open shows it: a system call would fail with EBADF, another exception.
"""

from __future__ import annotations

import pytest

from vmcell_protos.errors import HostError
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.ioctl import kvm_ioctl

NO_FD = 1_000_000
WITH_STRUCT = sorted(r for r in abi.REQUEST_NAMES if abi.request_size(r))
WITH_NUMBER = sorted(r for r in abi.REQUEST_NAMES if not abi.request_size(r))


def named(request: int) -> str:
    return abi.REQUEST_NAMES[request]


@pytest.mark.parametrize("request_number", WITH_STRUCT, ids=named)
def test_a_buffer_one_byte_short_is_no_system_call(request_number: int) -> None:
    short = bytearray(abi.request_size(request_number) - 1)
    with pytest.raises(ValueError, match=named(request_number)):
        kvm_ioctl(NO_FD, request_number, short)
    with pytest.raises(HostError, match=f"{named(request_number)}.*Bad file descriptor"):
        kvm_ioctl(NO_FD, request_number, bytearray(abi.request_size(request_number)))


@pytest.mark.parametrize("request_number", sorted(abi.FLEXIBLE_ENTRY_BYTES), ids=named)
def test_declared_entries_must_be_there(request_number: int) -> None:
    entry = abi.FLEXIBLE_ENTRY_BYTES[request_number]
    header = abi.request_size(request_number)
    buffer = bytearray((3).to_bytes(header, "little") + bytes(3 * entry))
    with pytest.raises(HostError):
        kvm_ioctl(NO_FD, request_number, buffer)
    with pytest.raises(ValueError, match=f"needs {header + 3 * entry} bytes"):
        kvm_ioctl(NO_FD, request_number, buffer[:-1])
    buffer[0] = 4
    with pytest.raises(ValueError):
        kvm_ioctl(NO_FD, request_number, buffer)


@pytest.mark.parametrize("request_number", WITH_STRUCT, ids=named)
def test_a_number_is_no_buffer(request_number: int) -> None:
    with pytest.raises(ValueError, match="takes a buffer"):
        kvm_ioctl(NO_FD, request_number, 0)


@pytest.mark.parametrize("request_number", WITH_NUMBER, ids=named)
def test_a_buffer_is_no_number(request_number: int) -> None:
    with pytest.raises(ValueError, match="takes a number"):
        kvm_ioctl(NO_FD, request_number, bytearray(8))
    for number in (0, 0xFFFB_D000):
        with pytest.raises(HostError, match="Bad file descriptor"):
            kvm_ioctl(NO_FD, request_number, number)
