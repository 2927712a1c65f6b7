"""Mount options of an OCI spec as flags and data: the table of mount(8) that runc uses too.

An option is a flag set, a flag cleared, a propagation, or data for the file system. Options that
only a host can honour (bind, idmap, tmpcopyup) are refused by name.
"""

from __future__ import annotations

import re

from vmcell_agent import abi, liveshare
from vmcell_agent.record import Record
from vmcell_protos.errors import CallerError

_FLAGS: dict[str, tuple[bool, int]] = {
    "defaults": (True, 0),
    "ro": (True, abi.MS_RDONLY),
    "rw": (False, abi.MS_RDONLY),
    "nosuid": (True, abi.MS_NOSUID),
    "suid": (False, abi.MS_NOSUID),
    "nodev": (True, abi.MS_NODEV),
    "dev": (False, abi.MS_NODEV),
    "noexec": (True, abi.MS_NOEXEC),
    "exec": (False, abi.MS_NOEXEC),
    "sync": (True, abi.MS_SYNCHRONOUS),
    "async": (False, abi.MS_SYNCHRONOUS),
    "dirsync": (True, abi.MS_DIRSYNC),
    "nosymfollow": (True, abi.MS_NOSYMFOLLOW),
    "symfollow": (False, abi.MS_NOSYMFOLLOW),
    "noatime": (True, abi.MS_NOATIME),
    "atime": (False, abi.MS_NOATIME),
    "nodiratime": (True, abi.MS_NODIRATIME),
    "diratime": (False, abi.MS_NODIRATIME),
    "relatime": (True, abi.MS_RELATIME),
    "norelatime": (False, abi.MS_RELATIME),
    "strictatime": (True, abi.MS_STRICTATIME),
    "nostrictatime": (False, abi.MS_STRICTATIME),
    "lazytime": (True, abi.MS_LAZYTIME),
    "nolazytime": (False, abi.MS_LAZYTIME),
}
PROPAGATION = {
    "private": abi.MS_PRIVATE,
    "rprivate": abi.MS_PRIVATE | abi.MS_REC,
    "slave": abi.MS_SLAVE,
    "rslave": abi.MS_SLAVE | abi.MS_REC,
    "shared": abi.MS_SHARED,
    "rshared": abi.MS_SHARED | abi.MS_REC,
    "unbindable": abi.MS_UNBINDABLE,
    "runbindable": abi.MS_UNBINDABLE | abi.MS_REC,
}
_REFUSED = frozenset(
    (
        "bind",
        "rbind",
        "remount",
        "idmap",
        "ridmap",
        "tmpcopyup",
        "mand",
        "rro",
        "rnoexec",
        "rnosuid",
    )
)
# Not a file system but the pod's one tmpfs, which all its containers have at /dev/shm.
POD_SHARED_MEMORY = "vmcell-shm"
FILESYSTEM_TYPES = frozenset(
    (
        *("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"),
        *(POD_SHARED_MEMORY, liveshare.FSTYPE),
    ),
)
# How the host shares a live directory; the first two say nothing here, the third is true of it.
_SHARED_AS = {"bind": "defaults", "rbind": "defaults", "rro": "ro"}
# These take data; the others' data names hierarchies or hosts and means nothing here.
_TYPES_WITH_DATA = frozenset(("tmpfs", "devpts", "proc", POD_SHARED_MEMORY))
_SHARED_MEMORY_DATA = r"size=[0-9]{1,15}[kKmMgG%]?|mode=[0-7]{1,4}"


class Mount(Record):
    """One mount inside the container, in the spec's order."""

    destination: str
    fstype: str
    flags: int
    propagation: int
    data: str
    source: str = ""  # of a live directory its number in the share


def parse_mount(
    destination: str, fstype: str, options: list[str], path: str, *, source: str = ""
) -> Mount:
    """The row for mount(2); `path` names the entry in errors. Raises CallerError."""
    if not destination.startswith("/"):
        raise CallerError(f"{path}.destination is {destination!r}; it must be absolute")
    if fstype == liveshare.FSTYPE:
        liveshare.check_source(source, path)
        options = [_SHARED_AS.get(word, word) for word in options]
    if fstype in ("bind", "none", "") or "bind" in options or "rbind" in options:
        raise CallerError(
            f"{path} binds a host path to {destination}; a guest sees no host path, "
            "the shim has to copy it in"
        )
    if fstype not in FILESYSTEM_TYPES:
        known = ", ".join(sorted(FILESYSTEM_TYPES))
        raise CallerError(f"{path}.type is {fstype!r} for {destination}; known are {known}")
    flags, propagation, data = 0, 0, []
    for option in options:
        if option in _REFUSED:
            raise CallerError(f"{path} asks for option {option!r} on {destination}; not supported")
        if option in _FLAGS:
            sets, bit = _FLAGS[option]
            flags = flags | bit if sets else flags & ~bit
        elif option in PROPAGATION:
            propagation = PROPAGATION[option]
        elif fstype == POD_SHARED_MEMORY and not re.fullmatch(_SHARED_MEMORY_DATA, option, re.A):
            raise CallerError(f"{path} has option {option!r}; {fstype} takes size= and mode= only")
        else:
            data.append(option)
    if fstype == "sysfs":  # by it devices come and go, which is PID 1's alone
        flags |= abi.MS_RDONLY
    if fstype == liveshare.FSTYPE:
        flags |= abi.MS_NOSUID | abi.MS_NODEV
    if fstype not in _TYPES_WITH_DATA:
        data = []
    return Mount(destination, fstype, flags, propagation, ",".join(data), source)
