"""Makes a forked child the user its spec says: limits, directory, groups, ids, capabilities.

The order is forced: hard limits may be raised only with CAP_SYS_RESOURCE, the bounding set dropped
only with CAP_SETPCAP, groups set only before the uid; runc's `finalizeNamespace` does the same.
"""

from __future__ import annotations

import os
import resource

from vmcell_agent import abi, capabilities, syscalls
from vmcell_agent.attempt import attempt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_agent.ociprocess import ProcessSpec

_PASSWD = "/etc/passwd"
_PASSWD_BYTES = 1 << 20


def set_oom_score(adjustment: int) -> None:
    """The child's own value instead of the agent's -1000; before the agent's /proc is gone."""
    with attempt(f"set oom_score_adj to {adjustment}"):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(adjustment).encode())
        finally:
            os.close(fd)


def set_limits(spec: ProcessSpec) -> None:
    for limit in spec.rlimits:
        try:
            resource.setrlimit(limit.number, (limit.soft, limit.hard))
        except ValueError as error:  # what the module makes of EPERM and EINVAL
            raise OSError(0, f"{limit.name} {limit.soft}:{limit.hard}: {error}") from error


def become(spec: ProcessSpec) -> None:
    """Drop to the user, groups and capabilities of `spec` for good."""
    with attempt("set resource limits"):
        set_limits(spec)
    with attempt("drop the capability bounding set"):
        capabilities.drop_bounding(spec.capabilities.bounding)
    with attempt(f"become user {spec.uid}:{spec.gid}"):
        syscalls.prctl(abi.PR_SET_KEEPCAPS, 1)
        os.setgroups(list(spec.additional_gids))
        os.setresgid(spec.gid, spec.gid, spec.gid)
        os.setresuid(spec.uid, spec.uid, spec.uid)
        syscalls.prctl(abi.PR_SET_KEEPCAPS, 0)
    with attempt("set capabilities"):
        capabilities.apply(spec.capabilities)
    if spec.no_new_privileges:
        with attempt("set no_new_privs"):
            syscalls.prctl(abi.PR_SET_NO_NEW_PRIVS, 1)
    os.umask(0o022 if spec.umask is None else spec.umask)


def home_directory(uid: int) -> str:
    """The user's home by the container's passwd file, "/" when it names none."""
    try:
        fd = os.open(_PASSWD, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return "/"
    try:
        content = os.read(fd, _PASSWD_BYTES).decode("utf-8", "replace")
    except OSError:
        return "/"
    finally:
        os.close(fd)
    for line in content.splitlines():
        fields = line.split(":")
        if len(fields) >= 6 and fields[2] == str(uid):
            return fields[5] or "/"
    return "/"
