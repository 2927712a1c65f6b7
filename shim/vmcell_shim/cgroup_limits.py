"""linux.cgroupsPath and linux.resources → which cgroup on the host, and how much it may take.

In that cgroup run the VMM and the daemons that serve it; the shim is where containerd puts it (its
option ShimCgroup). The guest's kernel enforces the container's limits inside; the host's bound what
the virtual machine as a whole may take:
- memory: the guest's RAM, and HOST_MEMORY_MIB and a 128th of that RAM beside it (VMM, shim, share
  daemon; page tables of host and guest). The page cache of images, disks and snapshots counts as
  well, but it gives way; where the spec has no limit there is room for as much of it as there is
  RAM, and the bound is one on what a VMM that a guest has taken over may take.
- CPU: shares, quota and CPU set as the spec says; VMM threads are part of what the pod pays for.
- tasks: HOST_TASKS; the guest's processes are no tasks of the host.
A pod's sandbox gets none of its own: the pod's cgroup is above it, and the limits in its spec are
those of a pause process.

Sources: OCI runtime-spec config-linux.md; systemd.slice(5) for the slices' names.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmcell_protos.errors import CallerError
from vmcell_shim.oci_json import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

HOST_MEMORY_MIB = 64
HOST_TASKS = 512
_UNLIMITED_BYTES = 1 << 62
_NAME_BYTES = 255
_SLICE, _SCOPE = ".slice", ".scope"
_DEFAULT_SLICE = "system.slice"


@dataclass(frozen=True, kw_only=True)
class HostLimits:
    """None and "": no limit. `cpus` and `mems` are lists as "0-3,8"."""

    memory_bytes: int | None = None
    cpu_shares: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    cpus: str = ""
    mems: str = ""
    tasks: int | None = None


def parse_cgroups_path(text: str) -> str:
    """The path below the root of each hierarchy, without a slash at its ends; "" for none.

    Both forms are known: a path ("/kubepods/podX/ID"), and systemd's "slice:prefix:name". Raises
    CallerError for what leads elsewhere.
    """
    if not text:
        return ""
    if not text.startswith("/") and text.count(":") == 2:
        path = _systemd_path(text)
    else:
        path = "/".join(part for part in text.split("/") if part)
    parts = path.split("/")
    for part in parts:
        if part in ("", ".", "..") or len(part.encode(errors="surrogateescape")) > _NAME_BYTES:
            raise _wrong(text, f"{part[:60]!r} is no name of a cgroup")
        if "\n" in part or "\0" in part:
            raise _wrong(text, "a name holds a line break or a zero byte")
    return path


def _systemd_path(text: str) -> str:
    parent, prefix, name = text.split(":")
    if not name or "/" in text:
        raise _wrong(text, "systemd's form is slice:prefix:name, without slashes")
    unit = name if name.endswith(_SLICE) else f"{prefix}-{name}{_SCOPE}"
    return "/".join([*_expand_slice(text, parent or _DEFAULT_SLICE), unit])


def _expand_slice(text: str, name: str) -> list[str]:
    """ "a-b.slice" lies in "a.slice"; "-.slice" is the root."""
    if name == "-" + _SLICE:
        return []
    stem = name[: -len(_SLICE)]
    if not name.endswith(_SLICE) or not all(stem.split("-")):
        raise _wrong(text, f"{name!r} is no name of a slice")
    parts = stem.split("-")
    return ["-".join(parts[: depth + 1]) + _SLICE for depth in range(len(parts))]


def _wrong(text: str, why: str) -> CallerError:
    return CallerError(f"linux.cgroupsPath is {text[:200]!r}: {why}")


def host_limits(spec: Json, *, guest_memory_mib: int, sandbox: bool) -> HostLimits:
    """The limits of the host's cgroup for a VM with that much RAM; raises CallerError for values
    of the wrong kind. `sandbox`: the spec is a pod's."""
    if sandbox:
        return HostLimits()
    memory = take(spec, "linux.resources.memory.limit", int, 0)
    quota = take(spec, "linux.resources.cpu.quota", int, 0)
    most_mib = guest_memory_mib + guest_memory_mib // 128 + HOST_MEMORY_MIB
    if not 0 < memory < _UNLIMITED_BYTES:
        most_mib += guest_memory_mib
    return HostLimits(
        memory_bytes=most_mib << 20,
        cpu_shares=_positive(take(spec, "linux.resources.cpu.shares", int, 0)),
        cpu_quota_us=_positive(quota),
        cpu_period_us=_positive(take(spec, "linux.resources.cpu.period", int, 0)),
        cpus=take(spec, "linux.resources.cpu.cpus", str, ""),
        mems=take(spec, "linux.resources.cpu.mems", str, ""),
        tasks=HOST_TASKS,
    )


def _positive(value: int) -> int | None:
    return value if value > 0 else None
