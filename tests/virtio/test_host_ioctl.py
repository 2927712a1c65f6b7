"""ioctl on TAP and vhost: what the kernel would read past its end is no system call (MS2).

A descriptor that is not open shows it: a system call would fail with EBADF, another exception.
"""

from __future__ import annotations

import pytest

from vmcell_protos.errors import HostError
from vmcell_runtime.virtio import host_abi
from vmcell_runtime.virtio.host_ioctl import MAX_ARGUMENT_BYTES, ioctl_bytes, ioctl_number

NO_FD = 1_000_000
REQUESTS = {
    name: value
    for name, value in vars(host_abi).items()
    if name.startswith(("VHOST_SET", "VHOST_GET", "VHOST_NET", "TUNSET")) and value >> 16
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_argument_one_byte_short_is_no_system_call(name: str) -> None:
    request = REQUESTS[name]
    size = request >> 16 & 0x3FFF
    with pytest.raises(ValueError, match=f"takes {size} bytes, not {size - 1}"):
        ioctl_bytes(NO_FD, request, bytes(size - 1), "asking")
    with pytest.raises(HostError, match="asking failed: Bad file descriptor"):
        ioctl_bytes(NO_FD, request, bytes(size), "asking")


@pytest.mark.parametrize("regions", [0, 1, 2, 31])
def test_regions_that_a_table_declares_must_be_there(regions: int) -> None:
    table = host_abi.vhost_memory.pack(regions, 0) + bytes(32 * regions)
    with pytest.raises(HostError):
        ioctl_bytes(NO_FD, host_abi.VHOST_SET_MEM_TABLE, table, "mapping")
    with pytest.raises(ValueError, match="mapping: request"):
        ioctl_bytes(NO_FD, host_abi.VHOST_SET_MEM_TABLE, table[:-1], "mapping")
    more = host_abi.vhost_memory.pack(regions + 1, 0) + table[8:]
    with pytest.raises(ValueError, match="mapping: request"):
        ioctl_bytes(NO_FD, host_abi.VHOST_SET_MEM_TABLE, more, "mapping")


@pytest.mark.parametrize("length", [MAX_ARGUMENT_BYTES + 1, 1 << 20])
def test_what_does_not_fit_the_copy_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="mapping"):
        ioctl_bytes(NO_FD, host_abi.VHOST_SET_MEM_TABLE, bytes(length), "mapping")


def test_a_number_goes_by_value() -> None:
    with pytest.raises(HostError, match="setting failed: Bad file descriptor"):
        ioctl_number(NO_FD, host_abi.TUNSETOFFLOAD, 0, "setting")
