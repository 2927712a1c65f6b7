"""A uid is one VMM's as long as something holds its file, and nobody's afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.vmm_uid import DEFAULT_RANGE, MAX_UID, UidRange, lease_uid

FEW = UidRange(5000, 3)


def test_each_gets_another_until_all_are_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "uids")
    leases = [lease_uid(FEW, path) for _ in range(FEW.size)]
    assert {lease.uid for lease in leases} == {5000, 5001, 5002}
    with pytest.raises(HostError, match="all 3 uids from 5000 on") as raised:
        lease_uid(FEW, path)
    assert raised.value.code == "resource_exhausted"
    # Another range is another's, also in the same file.
    beside = lease_uid(UidRange(5003, 1), path)
    os.close(leases[1].fd)
    again = lease_uid(FEW, path)
    assert again.uid == leases[1].uid
    for fd in (leases[0].fd, leases[2].fd, again.fd, beside.fd):
        os.close(fd)
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_it_is_held_by_who_has_the_file_not_by_who_took_it(tmp_path: Path) -> None:
    """As a shim takes it, hands it to its VMM, and is killed."""
    path = str(tmp_path / "uids")
    one = UidRange(5000, 1)
    lease = lease_uid(one, path)
    until, end = os.pipe()
    holder = os.fork()
    if not holder:
        os.close(end)
        os.read(until, 1)
        os._exit(0)
    os.close(lease.fd)
    with pytest.raises(HostError, match="belong to running VMMs"):
        lease_uid(one, path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    os.close(lease_uid(one, path).fd)
    os.close(until)
    os.close(end)


def test_a_link_where_the_file_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "uids").symlink_to(tmp_path / "elsewhere")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="uids are locked"):
        lease_uid(FEW, str(tmp_path / "uids"))
    assert not (tmp_path / "elsewhere").exists()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "uids", [UidRange(999, 1), UidRange(5000, 0), UidRange(MAX_UID, 2), UidRange(-5, 10)]
)
def test_a_range_must_be_one(uids: UidRange, tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="cannot be VMMs'"):
        lease_uid(uids, str(tmp_path / "uids"))
    DEFAULT_RANGE.check()
