"""What tells a restored guest from its siblings inside its containers: machine id and host name.

`renew` works in a child (see errand) that enters one container's namespaces after the other. What a
container's own files do not allow (a root that is read-only, a full disk, a symlink in the file's
place) is no reason to hold the guest up: it comes back as a sentence for the log.
"""

from __future__ import annotations

import os
import socket
import stat

from vmcell_agent import abi, copyin, syscalls
from vmcell_agent.record import Record
from vmcell_protos.errors import VmcellError

MACHINE_ID_BYTES = 16
MOST_BYTES = 64 << 10  # of what `renew` returns
_MACHINE_ID = "/etc/machine-id"
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Resident(Record):
    """One container: descriptors of its mount namespace and of its init, -1 for none."""

    name: str
    mounts: int
    init: int  # a pidfd, where the container has a host name of its own


def renew(residents: list[Resident], machine_id: bytes, hostname: str) -> bytes:
    """Write /etc/machine-id of each where there is an /etc, and set its host name unless that is
    "". Returns a line for each that could not be done."""
    lines = []
    for resident in residents:
        try:
            what = f"write {_MACHINE_ID}"
            _write_machine_id(resident, machine_id)
            what = f"set hostname {hostname!r}"
            _set_hostname(resident, hostname)
        except (OSError, VmcellError) as error:
            reason = getattr(error, "strerror", None) or error
            lines.append(f"{resident.name}: {what}: {reason}")
    return "\n".join(lines).encode("utf-8", "replace")[:MOST_BYTES]


def _write_machine_id(resident: Resident, machine_id: bytes) -> None:
    """In place, so that whoever has it open or mounted sees the new one."""
    if resident.mounts < 0:
        return
    syscalls.setns(resident.mounts, abi.CLONE_NEWNS)
    try:
        etc = os.open("/etc", os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        copyin.refuse_kernel_files(_MACHINE_ID, etc)
        fd = os.open("machine-id", _FLAGS, 0o444, dir_fd=etc)
    finally:
        os.close(etc)
    try:
        copyin.refuse_kernel_files(_MACHINE_ID, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "it is no regular file")
        text = machine_id.hex().encode() + b"\n"
        if os.pwrite(fd, text, 0) == len(text):
            os.ftruncate(fd, len(text))
    finally:
        os.close(fd)


def _set_hostname(resident: Resident, hostname: str) -> None:
    if resident.init >= 0 and hostname:
        syscalls.setns(resident.init, abi.CLONE_NEWUTS)
        socket.sethostname(hostname)
