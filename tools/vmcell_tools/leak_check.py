"""What of sandboxes is on this host right now, so that "nothing is left" can be checked.

An inventory is a set of lines for each kind of thing that a sandbox may leave behind. Two of them,
taken before and after, are compared line by line; whatever is new is a leak. Run as
`python -m vmcell_tools.leak_check`, it prints the inventory as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vmcell_protos.errors import HostError

Inventory = dict[str, list[str]]

STATE_FOLDERS = ("/run/vmcell", "/run/containerd/s", "/run/containerd/fifo")
# Files of the service itself, there whether a sandbox runs or not.
SERVICE_FILES = (
    *("noded.sock", "noded.pid", "api.sock", "route.sock", "nginx", "slots"),
    *("zygote.sock", "metrics"),
)
NOT_SANDBOXES = ("leak_check", "containerd-shim-vmcell-v2 zygote")
PROCESS_WORDS = ("vmcell_runtime", "vmcell_shim", "containerd-shim", "mkfs.erofs", "vmcell-vmm")


def _processes() -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word in words for word in NOT_SANDBOXES):
            continue
        if any(word in words for word in PROCESS_WORDS):
            found.append(f"{folder.name} {words.strip()[:160]}")
    return found


def _mounts() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = (line.split()[4] for line in lines)
    return [t for t in targets if "vmcell" in t or "/io.containerd.runtime.v2.task/" in t]


def _taps_in_use() -> list[str]:
    found = []
    for folder in Path("/sys/class/net").iterdir():
        # Unattached TAPs of the slot pool have no carrier; one with a carrier has an owner.
        try:
            if (folder / "tun_flags").exists() and (folder / "carrier").read_text().strip() == "1":
                found.append(folder.name)
        except OSError:
            continue  # a TAP that is down has no carrier to read
    return found


def _loop_devices() -> list[str]:
    backing = Path("/sys/block").glob("loop*/loop/backing_file")
    return [path.read_text().strip() for path in backing]


def _state_files() -> list[str]:
    return [
        str(path)
        for folder in STATE_FOLDERS
        if Path(folder).exists()
        for path in Path(folder).rglob("*")
        if path.is_dir() is False and not any(word in path.parts for word in SERVICE_FILES)
    ]


def _network_namespaces() -> list[str]:
    return [str(path) for path in Path("/run/netns").glob("*")]


def _bundles() -> list[str]:
    return [str(path) for path in Path("/run/containerd").glob("io.containerd.runtime.v2.task/*/*")]


def _ctr(*words: str) -> list[str]:
    result = subprocess.run(["ctr", *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise HostError(f"ctr {' '.join(words)} failed: {result.stderr.strip()}")
    return result.stdout.splitlines()


def _in_every_namespace(*words: str) -> list[str]:
    return [
        f"{namespace} {line}"
        for namespace in _ctr("namespaces", "list", "-q")
        for line in _ctr("-n", namespace, *words)
    ]


def _active_snapshots() -> list[str]:
    lines = _in_every_namespace("snapshots", "list")
    return [line for line in lines if line.split()[-1] in ("Active", "View")]


KINDS: dict[str, Callable[[], list[str]]] = {
    "processes": _processes,
    "mounts": _mounts,
    "taps in use": _taps_in_use,
    "loop devices": _loop_devices,
    "network namespaces": _network_namespaces,
    "files": _state_files,
    "bundles": _bundles,
    "containers": lambda: _in_every_namespace("containers", "list", "-q"),
    "tasks": lambda: _in_every_namespace("tasks", "list", "-q"),
    "snapshots": _active_snapshots,
    "leases": lambda: _in_every_namespace("leases", "list", "-q"),
}


def take_inventory() -> Inventory:
    """One sorted list per kind; raises HostError when containerd does not answer."""
    return {kind: sorted(look()) for kind, look in KINDS.items()}


def leaks(before: Inventory, after: Inventory) -> list[str]:
    """What `after` has and `before` had not, as "kind: line"."""
    return [
        f"{kind}: {line}"
        for kind, lines in after.items()
        for line in lines
        if line not in before.get(kind, [])
    ]


if __name__ == "__main__":
    json.dump(take_inventory(), sys.stdout, indent=1)
    sys.stdout.write("\n")
