"""The process that asks the zygote for a child: what the child takes over from it.

A program that is executed inherits its parent's world; a child of the zygote has the zygote's. Part
of the difference is made up for here (cgroup, limits, priority, groups, umask, OOM score); where
the rest differs (namespaces, root, rights, CPUs) the child refuses and the caller helps itself.
Sources: proc(5), namespaces(7), cgroups(7). The caller waits for its answer, so its pid is its own.
"""

from __future__ import annotations

import os
import resource

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_SAME_IN_STATUS = (
    *(b"Uid", b"Gid", b"NoNewPrivs", b"Seccomp", b"Cpus_allowed", b"Mems_allowed"),
    *(b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb"),
)
_GROUPS, _UMASK = b"Groups", b"Umask"
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})
_UNIFIED = b"0::"
_CAP_SYS_NICE = 1 << 23


class Caller:
    """What is to be seen of process `pid`, read once. Raises OSError when it has gone."""

    def __init__(self, pid: int | str) -> None:
        self.pid = pid
        self.namespaces = [_namespace(pid, name) for name in _NAMESPACES]
        root = os.stat(f"/proc/{pid}/root")
        self.root = root.st_dev, root.st_ino
        self.status = _status(pid)
        self.cgroup, self.legacy = _cgroups(pid)
        self.name = os.fsdecode(self.status[b"Name"])
        self.label = _security_label(pid)
        self.policy = os.sched_getscheduler(0 if pid == "self" else int(pid))
        self.oom_score = _read(f"/proc/{pid}/oom_score_adj")


class World:
    """This process's own, and its children's: taken once, before they are born."""

    def __init__(self) -> None:
        self._own = Caller("self")
        self._limits = {limit: resource.getrlimit(limit) for limit in _LIMITS}
        self._cgroup_mount = _cgroup_mount()

    @property
    def may_raise_priority(self) -> bool:
        """Whether one that has given up its priority can have it back."""
        return bool(int(self._own.status[b"CapEff"], 16) & _CAP_SYS_NICE)

    def difference(self, caller: Caller) -> str:
        """What of the caller's world a child cannot take over; "" when nothing."""
        own = self._own
        for name, theirs, ours in zip(_NAMESPACES, caller.namespaces, own.namespaces, strict=True):
            if theirs != ours:
                return f"{name} namespace"
        if caller.root != own.root:
            return "root directory"
        for field in _SAME_IN_STATUS:
            if caller.status.get(field) != own.status.get(field):
                return f"{field.decode()} of /proc/{caller.pid}/status"
        if (caller.label, caller.policy) != (own.label, own.policy):
            return "security label or scheduling policy"
        return "cgroup of a version 1 hierarchy" if caller.legacy != own.legacy else ""

    def take_over(self, caller: Caller) -> None:
        """In a child: cgroup, limits, priority, groups, OOM score and umask become the caller's.

        Raises OSError; the child is then of no use.
        """
        pid = int(caller.pid)
        self.join_cgroup(caller)
        for limit, ours in self._limits.items():
            theirs = resource.prlimit(pid, limit)
            if theirs != ours:
                resource.setrlimit(limit, theirs)
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, pid))
        if caller.oom_score != self._own.oom_score:
            _write("/proc/self/oom_score_adj", caller.oom_score)
        if caller.status[_GROUPS] != self._own.status[_GROUPS]:
            os.setgroups([int(group) for group in caller.status[_GROUPS].split()])
        os.umask(int(caller.status[_UMASK], 8))

    def join_cgroup(self, caller: Caller) -> None:
        """Moves this process, which has one thread, unless it is there already. OSError."""
        own, _ = _cgroups("self")  # an administrator may have moved the zygote
        if caller.cgroup == own:
            return
        if not self._cgroup_mount:
            raise FileNotFoundError("the whole cgroup2 hierarchy is mounted nowhere")
        _write(
            os.path.join(self._cgroup_mount, os.fsdecode(caller.cgroup[1:]), "cgroup.procs"), b"0"
        )


def _cgroup_mount() -> str:
    """Where the unified hierarchy is mounted from its root on; "" when nowhere."""
    for line in _read("/proc/self/mountinfo").splitlines():
        words = line.split()
        if words[words.index(b"-") + 1] == b"cgroup2" and words[3] == b"/":
            return os.fsdecode(words[4])
    return ""


def _cgroups(pid: int | str) -> tuple[bytes, list[bytes]]:
    """Its path in the unified hierarchy, "" when it is in none, and the lines of the others."""
    lines = _read(f"/proc/{pid}/cgroup").splitlines()
    unified = next((line[3:] for line in lines if line.startswith(_UNIFIED)), b"")
    return unified, [line for line in lines if not line.startswith(_UNIFIED)]


def _namespace(pid: int | str, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}")
    except FileNotFoundError:
        # The kernel was built without this kind; a caller that has gone fails at its root.
        return ""


def _security_label(pid: int | str) -> bytes:
    try:
        return _read(f"/proc/{pid}/attr/current")
    except OSError:
        # No security module of that kind; a caller that has gone fails at its root.
        return b""


def _status(pid: int | str) -> dict[bytes, bytes]:
    rows = (line.partition(b":") for line in _read(f"/proc/{pid}/status").splitlines())
    return {name: value.strip() for name, _, value in rows}


def _read(path: str) -> bytes:
    """Not by open(): its buffers and decoders would be touched, and so copied, in every child."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while chunk := os.read(fd, 1 << 16):
            data += chunk
        return data
    finally:
        os.close(fd)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
