"""noded in a test's own process; the runtime is runc, the shim's part of snapshots a double."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_containerd import RealContainerd
from stand_in_images import GOOD

from vmcell_api.config import ApiConfig
from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.node.__main__ import build_node
from vmcell_api.node.build import SandboxRequest
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import Sandbox

TOKEN = "t0ken"


@contextlib.contextmanager
def opened_node(config: ApiConfig) -> Iterator[Node]:
    node = build_node(config)
    node.open()
    try:
        yield node
    finally:
        node.close()


def remove_all(node: Node, containerd: RealContainerd, config: ApiConfig) -> None:
    for sandbox in node.list():
        node.kill(sandbox.sandbox_id)
    for record in node.snapshots.records():
        node.snapshots.remove(record.snapshot_id)
    nothing_left(node, containerd, config)


def nothing_left(node: Node, containerd: RealContainerd, config: ApiConfig) -> None:
    assert not any(containerd.traces().values()), containerd.traces()
    assert node.slots.free_count == 3
    folder = Path(config.state_dir, ".noded")
    assert not folder.exists() or not list(folder.iterdir())
    assert snapshot_names(config) == []


def snapshot_names(config: ApiConfig) -> list[str]:
    """Directories of snapshots and records, whole or not."""
    folder = Path(config.snapshot_dir)
    found = [path.name for path in folder.iterdir() if path.name != ".noded"]
    return sorted(found + [path.name for path in (folder / ".noded").rglob("*.*")])


def request_of(**options: object) -> SandboxRequest:
    values = {
        "sandbox_id": new_sandbox_id(),
        "template_id": "good",
        "image": GOOD,
        "vcpus": 1,
        "memory_mib": 128,
        "timeout_ms": 600_000,
        "environment": {"COLOUR": "red"},
        "access_token": TOKEN,
        "default_user": "user",
    }
    return SandboxRequest(**{**values, **options})  # type: ignore[arg-type]  # test values


def init_of(containerd: RealContainerd, container_id: str) -> dict[str, object]:
    """What envd of the container was told last."""
    rows = [line.split() for line in containerd.ctr("tasks", "list").splitlines()[1:]]
    pid = next(row[1] for row in rows if row[0] == container_id)
    return json.loads(Path("/proc", pid, "root/init.json").read_text())


def labels_of(containerd: RealContainerd, container_id: str) -> dict[str, str]:
    return json.loads(containerd.ctr("containers", "info", container_id))["Labels"]


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    calls: list[str] = []
    original = getattr(Containerd, name)

    def counted(self: Containerd, container_id: str, *arguments: object, **options: object):
        calls.append(container_id)
        return original(self, container_id, *arguments, **options)

    monkeypatch.setattr(Containerd, name, counted)
    return calls


def snapshot_of(containerd: RealContainerd, sandbox: Sandbox) -> str:
    """The snapshot that a sandbox was made of, "" for none."""
    info = json.loads(containerd.ctr("containers", "info", sandbox.container))
    return info["Spec"]["annotations"].get("io.vmcell.snapshot", "")
