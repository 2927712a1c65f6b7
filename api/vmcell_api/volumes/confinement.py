"""A process that sees the volumes and nothing else of the host.

Mount, network and ipc namespaces of its own; the volumes' directory as root, without devices,
setuid and execution; a user of its own; and of root's capabilities only the three that it takes to
handle files of any owner. It keeps what was open before: its listening socket and its log.
"""

from __future__ import annotations

import os

from vmcell_api.volumes import syscalls
from vmcell_protos.errors import HostError

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER = 0, 1, 3
KEPT = 1 << CAP_CHOWN | 1 << CAP_DAC_OVERRIDE | 1 << CAP_FOWNER


def confine(directory: str, uid: int) -> None:
    """Makes `directory` the root of this process, which must be root and have one thread.

    Nothing can be imported afterwards. Raises HostError, and then the process must end.
    """
    try:
        _enter(directory)
        os.setgroups([])
        syscalls.drop_bounding(KEPT)
        syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        syscalls.set_capabilities(KEPT)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        os.umask(0o077)
    except OSError as error:
        raise HostError(
            f"cannot confine the server of volume files to {directory}: {error}; run it as root"
        ) from error


def _enter(directory: str) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC)
    syscalls.mount("none", "/", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount(directory, directory, syscalls.MS_BIND)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("none", directory, syscalls.MS_REMOUNT | syscalls.MS_BIND | flags)
    os.chdir(directory)
    syscalls.pivot_root_here()
    os.chdir("/")
