"""What of sandboxes is on this host right now, so that "nothing is left" can be checked.

An inventory is a set of lines for each kind of thing that a sandbox may leave behind. Two of them,
taken before and after, are compared line by line; whatever is new is a leak. Run as
`python -m vmcell_tools.leak_check`, it prints the inventory as JSON; with `--each-line` it stays
and prints one for every line it reads, which spares an emulated CPU the seconds of its start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from vmcell_api.node.containerd import Containerd
from vmcell_protos.pb.containerd import namespaces_pb2, namespaces_pb2_grpc, snapshots_pb2

Inventory = dict[str, list[str]]

SOCKET = "/run/containerd/containerd.sock"
SNAPSHOTTER = "overlayfs"
CALL_WITHIN_S = 60.0
STATE_FOLDERS = ("/run/vmcell", "/run/containerd/s", "/run/containerd/fifo")
# Files of the service itself, there whether a sandbox runs or not.
SERVICE_FILES = (
    *("noded.sock", "noded.pid", "api.sock", "route.sock", "nginx", "slots"),
    *("zygote.sock", "metrics", "vmm-uids"),
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


def _namespaces(socket: str) -> list[str]:
    with closing(_containerd(socket, "default")) as client:
        stub = client.stub(namespaces_pb2_grpc.NamespacesStub)
        request = namespaces_pb2.ListNamespacesRequest()
        answer = client.call(stub.List, request, "listing the namespaces", timeout_s=CALL_WITHIN_S)
        return sorted(namespace.name for namespace in answer.namespaces)


def _containerd(socket: str, namespace: str) -> Containerd:
    """Connected anew each time: the daemon may have been started anew since the last."""
    return Containerd(socket, namespace=namespace, snapshotter=SNAPSHOTTER)


def _active_snapshots(client: Containerd) -> list[str]:
    kinds = {snapshots_pb2.ACTIVE: "Active", snapshots_pb2.VIEW: "View"}
    return [f"{info.name} {kinds[info.kind]}" for info in client.snapshots() if info.kind in kinds]


KINDS: dict[str, Callable[[], list[str]]] = {
    "processes": _processes,
    "mounts": _mounts,
    "taps in use": _taps_in_use,
    "loop devices": _loop_devices,
    "network namespaces": _network_namespaces,
    "files": _state_files,
    "bundles": _bundles,
}
IN_CONTAINERD: dict[str, Callable[[Containerd], Iterable[str]]] = {
    "containers": lambda client: [container.id for container in client.containers()],
    "tasks": lambda client: client.task_states(),
    "snapshots": _active_snapshots,
    "leases": lambda client: client.lease_ids(),
}


def take_inventory(socket: str = SOCKET) -> Inventory:
    """One sorted list per kind; raises HostError when containerd does not answer there."""
    found = {kind: look() for kind, look in KINDS.items()} | {kind: [] for kind in IN_CONTAINERD}
    for namespace in _namespaces(socket):
        with closing(_containerd(socket, namespace)) as client:
            for kind, ask in IN_CONTAINERD.items():
                found[kind] += [f"{namespace} {line}" for line in ask(client)]
    return {kind: sorted(lines) for kind, lines in found.items()}


def leaks(before: Inventory, after: Inventory) -> list[str]:
    """What `after` has and `before` had not, as "kind: line"."""
    return [
        f"{kind}: {line}"
        for kind, lines in after.items()
        for line in lines
        if line not in before.get(kind, [])
    ]


def main(words: list[str]) -> None:
    """One inventory, a line of JSON; with --each-line one for each line of standard input."""
    for _ in sys.stdin if "--each-line" in words else [""]:
        sys.stdout.write(json.dumps(take_inventory()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
