"""A uid for each VMM that no other one on this host has while it lives.

A lock on one byte of one file stands for a uid, the byte's number. The lock belongs to the open
file, which the VMM gets with its first message and never closes: so it ends with the VMM, and with
nothing else, whatever becomes of the shim that took it. Source: fcntl(2), "Open file description
locks".

Default range: above everything that systemd and useradd give away (systemd, UIDS-GIDS.md), below
2**31.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from vmcell_protos.errors import CallerError, HostError

LOCK_FILE = "/run/vmcell/vmm-uids"
MAX_UID = 2**31 - 1
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of x86-64: type, whence, start, len, pid
_F_OFD_SETLK = 37


class UidRange(NamedTuple):
    """`size` uids from `first` on; each is a gid too. Nobody else on the host may have them."""

    first: int = 2_000_000_000
    size: int = 32_768

    def check(self) -> None:
        """CallerError unless every one of them can be a VMM's."""
        if self.first < 1000 or self.size < 1 or self.first + self.size - 1 > MAX_UID:
            raise CallerError(
                f"{self.size} uids from {self.first} on cannot be VMMs'; "
                f"name some between 1000 and {MAX_UID}"
            )


DEFAULT_RANGE = UidRange()


class Lease(NamedTuple):
    """A uid, and the open file that holds it: the taker's to close or to hand on."""

    uid: int
    fd: int


def lease_uid(uids: UidRange = DEFAULT_RANGE, path: str = LOCK_FILE) -> Lease:
    """Takes a free uid. HostError (resource_exhausted) when all are taken, or `path` is no good."""
    uids.check()
    try:
        os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError(f"cannot open {path}, where VMMs' uids are locked: {error}") from error
    try:
        # Anywhere, so that a uid rests for long before it is somebody's again.
        start = int.from_bytes(os.urandom(4), "little")
        for step in range(uids.size):
            uid = uids.first + (start + step) % uids.size
            if _lock(fd, uid):
                return Lease(uid, fd)
        raise HostError(
            f"all {uids.size} uids from {uids.first} on belong to running VMMs; "
            "give vmm_uid_count of config.toml a higher value",
            code="resource_exhausted",
        )
    except BaseException:
        os.close(fd)
        raise


def _lock(fd: int, uid: int) -> bool:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, uid, 1, 0)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise HostError(f"locking uid {uid} for a VMM failed: {error.strerror}") from error
    return True
