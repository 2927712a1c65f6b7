"""Capability names of an OCI spec as bits, and the calls that make a set effective.

The table is <linux/capability.h> of Linux 6.12, in order of number; capabilities(7) says which set
means what. A name that is not in the table is refused: dropping it silently could leave a program
with less than it was promised, keeping it is impossible.
"""

from __future__ import annotations

from vmcell_agent import abi, syscalls
from vmcell_agent.record import Record
from vmcell_protos.errors import CallerError

NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
_BITS = {name: 1 << number for number, name in enumerate(NAMES)}


class CapabilitySets(Record):
    """The five sets of capabilities(7), each a number of bits; all empty is the default."""

    bounding: int = 0
    effective: int = 0
    permitted: int = 0
    inheritable: int = 0
    ambient: int = 0


def bits(names: list[str], where: str) -> int:
    """The set that `names` spell; raises CallerError for a name that is not in the table."""
    result = 0
    for name in names:
        bit = _BITS.get(name.upper())
        if bit is None:
            raise CallerError(f"{where} names {name!r}, which is no capability of this kernel")
        result |= bit
    return result


def drop_bounding(keep: int) -> None:
    """Remove from the bounding set what is not in `keep`; needs CAP_SETPCAP."""
    for number in range(len(NAMES)):
        if not keep >> number & 1:
            syscalls.prctl(abi.PR_CAPBSET_DROP, number)


def apply(sets: CapabilitySets) -> None:
    """Make the sets those of this process; the bounding set has been dropped before."""
    syscalls.capset(sets.effective, sets.permitted, sets.inheritable)
    syscalls.prctl(abi.PR_CAP_AMBIENT, abi.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(len(NAMES)):
        if sets.ambient >> number & 1:
            syscalls.prctl(abi.PR_CAP_AMBIENT, abi.PR_CAP_AMBIENT_RAISE, number)
