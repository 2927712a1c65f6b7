"""The cgroup of a pod or container on the host: made, limited, joined, removed.

cgroup v1, v2, or both at once (hybrid): the same path is used in every hierarchy that is mounted.
A cgroup of ours is a leaf that nobody else is in, so removing it by its path alone is safe, from
whatever process. Where a hierarchy lacks a controller, the limit is left to the guest's kernel and
named in `HostCgroup.missing`. Sources: Linux admin-guide/cgroup-v1, cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass

from vmcell_protos.errors import CallerError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.cgroup_limits import HostLimits

_CONTROLLERS = ("cpu", "io", "memory", "pids")
_DEFAULT_PERIOD_US = 100_000
_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """Where one is mounted. `controllers` of v1 are the mount's; of v2 those of its root."""

    mount_point: str
    version: int
    controllers: frozenset[str]

    def directory(self, path: str) -> str:
        return os.path.join(self.mount_point, path)


class HostCgroup:
    """One cgroup in every hierarchy. `missing` names limits that no controller took."""

    def __init__(self, path: str, hierarchies: tuple[Hierarchy, ...]) -> None:
        self.path = path
        self.missing: tuple[str, ...] = ()
        self._hierarchies = hierarchies

    def set_limits(self, limits: HostLimits) -> None:
        """Writes what `limits` names; what it leaves out stays. Raises HostError."""
        missing = []
        for controller, rows in _limit_files(limits).items():
            where = [row for row in self._hierarchies if self._has(row, controller)]
            if not where:
                missing.append(controller)
            for row in where:
                for name, value in rows[row.version - 1]:
                    _write(os.path.join(row.directory(self.path), name), value)
        self.missing = tuple(missing)

    def _has(self, row: Hierarchy, controller: str) -> bool:
        if controller not in row.controllers:
            return False
        if row.version == 1:
            return True
        # Only what the parent hands down has files here.
        return controller in _words(os.path.join(row.directory(self.path), "cgroup.controllers"))

    def join(self, pid: int) -> None:
        """Moves a process with all its threads; raises HostError."""
        for row in self._hierarchies:
            _write(os.path.join(row.directory(self.path), "cgroup.procs"), str(pid))


def create_cgroup(path: str, limits: HostLimits) -> HostCgroup:
    """Makes the cgroup with its parents; `path` as parse_cgroups_path gives it.

    Raises CallerError when somebody else is in it, HostError when it cannot be made; nothing of it
    is left then.
    """
    rows = find_hierarchies()
    if not path:
        raise CallerError("the root of all cgroups cannot be a container's own")
    group = HostCgroup(path, rows)
    try:
        for row in rows:
            _make(row, path, want_cpuset=bool(limits.cpus or limits.mems))
        group.set_limits(limits)
    except BaseException:
        # The first error is the one to tell; what is left is empty, and used by the next attempt.
        with contextlib.suppress(HostError):
            remove_cgroup(path, timeout_s=0)
        raise
    return group


def _make(row: Hierarchy, path: str, *, want_cpuset: bool) -> None:
    directory = row.mount_point
    wanted = (*_CONTROLLERS, "cpuset") if want_cpuset else _CONTROLLERS
    try:
        for part in path.split("/"):
            if row.version == 2:
                _hand_down(directory, wanted)
            parent, directory = directory, os.path.join(directory, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o755)
            if "cpuset" in row.controllers and row.version == 1:
                _inherit_cpuset(parent, directory)
        inhabited = _words(os.path.join(directory, "cgroup.procs"))
        inhabited += [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    except OSError as error:
        raise HostError(f"cannot make the cgroup {directory}: {error.strerror}") from error
    if inhabited:
        raise CallerError(
            f"the cgroup {directory} is in use ({' '.join(inhabited[:5])}); "
            "linux.cgroupsPath must name one of the container's own"
        )


def _hand_down(directory: str, wanted: tuple[str, ...]) -> None:
    """Lets the children of a v2 cgroup have controllers (cgroup-v2.rst, "Enabling")."""
    there = _words(os.path.join(directory, "cgroup.controllers"))
    given = _words(os.path.join(directory, "cgroup.subtree_control"))
    for name in wanted:
        if name in there and name not in given:
            # One that holds processes, or is not ours to change, cannot: the limit has no file
            # below it then, which set_limits notes.
            with contextlib.suppress(OSError):
                _put(os.path.join(directory, "cgroup.subtree_control"), f"+{name}")


def _inherit_cpuset(parent: str, directory: str) -> None:
    """A cgroup without CPUs or memory nodes takes no process (cgroup-v1/cpusets.rst)."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not _words(os.path.join(directory, name)):
            _put(os.path.join(directory, name), "".join(_words(os.path.join(parent, name))))


def _limit_files(limits: HostLimits) -> dict[str, tuple[list[tuple[str, str]], ...]]:
    """Per controller: files and values of v1, then of v2."""
    files: dict[str, tuple[list[tuple[str, str]], ...]] = {}
    if limits.memory_bytes is not None:
        value = str(limits.memory_bytes)
        files["memory"] = ([("memory.limit_in_bytes", value)], [("memory.max", value)])
    if limits.tasks is not None:
        files["pids"] = tuple([("pids.max", str(limits.tasks))] for _ in range(2))
    cpu_v1, cpu_v2 = [], []
    if limits.cpu_shares is not None:
        cpu_v1.append(("cpu.shares", str(limits.cpu_shares)))
        cpu_v2.append(("cpu.weight", str(weight_of_shares(limits.cpu_shares))))
    if limits.cpu_quota_us is not None:
        period = limits.cpu_period_us or _DEFAULT_PERIOD_US
        # The quota first goes away, so that no mixture of old and new is refused.
        cpu_v1 += [("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", str(period))]
        cpu_v1.append(("cpu.cfs_quota_us", str(limits.cpu_quota_us)))
        cpu_v2.append(("cpu.max", f"{limits.cpu_quota_us} {period}"))
    if cpu_v1:
        files["cpu"] = (cpu_v1, cpu_v2)
    names = (("cpuset.cpus", limits.cpus), ("cpuset.mems", limits.mems))
    sets = [(name, value) for name, value in names if value]
    if sets:
        files["cpuset"] = (sets, sets)
    return files


def weight_of_shares(shares: int) -> int:
    """v1's 2..262144 onto v2's 1..10000, as runc and the kubelet do it."""
    bounded = min(max(shares, 2), 262_144)
    return 1 + (bounded - 2) * 9999 // 262_142


def members(path: str) -> set[int]:
    """The processes in the cgroup, of all hierarchies; none when it is not there."""
    found: set[int] = set()
    for row in find_hierarchies():
        with contextlib.suppress(FileNotFoundError):
            found.update(map(int, _words(os.path.join(row.directory(path), "cgroup.procs"))))
    return found


def remove_cgroup(path: str, *, timeout_s: float) -> None:
    """Removes the cgroup in every hierarchy; idempotent. Parents stay.

    A process that has just ended keeps it busy for a moment. Raises HostError naming who is still
    in it after `timeout_s`.
    """
    if not path:
        raise CallerError("the root of all cgroups cannot be removed")
    deadline = time.monotonic() + timeout_s
    directories = [row.directory(path) for row in find_hierarchies()]
    failures = [failure for directory in directories if (failure := _remove(directory, deadline))]
    if failures:
        inside = sorted(members(path))
        raise HostError(
            f"cgroup {path} is left behind: {'; '.join(failures)}; processes in it: "
            f"{' '.join(map(str, inside[:10])) or 'none'}"
        )


def _remove(directory: str, deadline: float) -> str:
    """What is wrong at the deadline, "" when it has gone."""
    pause_s = _PAUSE_S
    while True:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return ""
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                return f"{directory}: {error.strerror}"
            # v1 tells nobody when the last process has left.
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def find_hierarchies(mountinfo: str = "/proc/self/mountinfo") -> tuple[Hierarchy, ...]:
    """Every cgroup hierarchy that is mounted, each once. Raises HostError when there is none."""
    found: dict[frozenset[str], Hierarchy] = {}
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                kind, _, options = right.rstrip("\n").split(" ")[:3]
                if kind not in ("cgroup", "cgroup2"):
                    continue
                row = _hierarchy(left.split(" ")[4], kind, options)
                key = row.controllers if row.version == 1 else frozenset({"cgroup2"})
                if key not in found or len(row.mount_point) < len(found[key].mount_point):
                    found[key] = row
    except OSError as error:
        raise HostError(f"cannot find the cgroup hierarchies: {error}") from error
    if not found:
        raise HostError("no cgroup hierarchy is mounted; mount cgroup2 on /sys/fs/cgroup")
    return tuple(sorted(found.values(), key=lambda row: row.mount_point))


def _hierarchy(mount_point: str, kind: str, options: str) -> Hierarchy:
    if kind == "cgroup2":
        controllers = _words(os.path.join(mount_point, "cgroup.controllers"))
        return Hierarchy(mount_point=mount_point, version=2, controllers=frozenset(controllers))
    # Super options of v1: the controllers, "name=...", and flags such as "rw" and "xattr".
    return Hierarchy(
        mount_point=mount_point, version=1, controllers=frozenset(options.split(",")) - {"rw", "ro"}
    )


def _words(path: str) -> list[str]:
    with open(path) as file:
        return file.read().split()


def _put(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _write(path: str, value: str) -> None:
    try:
        _put(path, value)
    except OSError as error:
        raise HostError(f"cannot write {value!r} to {path}: {error.strerror}") from error
