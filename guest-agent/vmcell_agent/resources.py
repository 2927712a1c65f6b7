"""`linux.resources` of an OCI spec as files of cgroup v2: at creation, and to change them later.

Limits are shaped as in cgroup v1 (config-linux.md, "Control groups"); the weights follow runc's
conversion table. What limits the host's devices (devices, block, network, RDT) is ignored here.
"""

from __future__ import annotations

import re

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.jsonfields import Object

LARGEST = (1 << 63) - 1
_DEFAULT_PERIOD_US = 100_000
_CGROUP_FILE = r"(cpu|memory|pids|cpuset|io|hugetlb)(\.[a-zA-Z0-9_]+)+"


def cgroup_files(
    resources: Object, present: Callable[[str], str] = lambda name: ""
) -> dict[str, str]:
    """File → value, for what `resources` names; raises CallerError.

    `present` reads a file of the cgroup: v1 has two settings where v2 has one file, and the half
    that is not named stays as it is.
    """
    files = _memory_files(resources.object("memory"), present)
    pids = resources.object("pids").number("limit", -1, LARGEST)
    if pids:
        files["pids.max"] = "max" if pids < 0 else str(pids)
    files.update(_cpu_files(resources.object("cpu"), present))
    for name, value in resources.text_map("unified").items():
        if not re.fullmatch(_CGROUP_FILE, name, re.ASCII):
            raise CallerError(f"{resources.path}.unified names {name!r}; no file of cgroup v2")
        files[name] = value
    return files


def _memory_files(memory: Object, present: Callable[[str], str]) -> dict[str, str]:
    files: dict[str, str] = {}
    limit = memory.number("limit", -1, LARGEST)
    if limit:
        files["memory.max"] = "max" if limit < 0 else str(limit)
    reservation = memory.number("reservation", -1, LARGEST)
    if reservation:
        files["memory.low"] = "max" if reservation < 0 else str(reservation)
    swap = memory.number("swap", -1, LARGEST)
    if swap:  # v1 counts memory and swap together
        limit = limit or _number(present("memory.max"))
        files["memory.swap.max"] = "max" if swap < 0 else str(max(0, swap - max(0, limit)))
    return files


def _cpu_files(cpu: Object, present: Callable[[str], str]) -> dict[str, str]:
    files: dict[str, str] = {}
    shares = cpu.number("shares", 0, LARGEST)
    if shares:
        files["cpu.weight"] = str(1 + ((max(2, min(shares, 262144)) - 2) * 9999) // 262142)
    quota, period = cpu.number("quota", -1, LARGEST), cpu.number("period", 0, 1_000_000)
    if quota or period:
        old_quota, _, old_period = present("cpu.max").strip().partition(" ")
        new_quota = (str(quota) if quota > 0 else "max") if quota else old_quota or "max"
        files["cpu.max"] = f"{new_quota} {period or _number(old_period) or _DEFAULT_PERIOD_US}"
    for key in ("cpus", "mems"):
        if cpu.text(key):
            files[f"cpuset.{key}"] = cpu.text(key)
    return files


def _number(text: str) -> int:
    """A cgroup file's number; "max" and what is not there are 0."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else 0
