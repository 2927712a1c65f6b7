"""Saving a container and going on from it: what containerd asks of a shim, and what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_vmm import FakeVmm
from shim_harness import Shim, shim_in

from vmcell_protos import task
from vmcell_protos.wellknown import Any as AnyMessage
from vmcell_protos.wellknown import Empty
from vmcell_shim.config import load_config
from vmcell_shim.digests import snapshot_digests
from vmcell_shim.snapshot_store import OpenSnapshot, open_snapshot

OWN_OPTIONS = "io.vmcell.v1.CheckpointOptions"
RUNC_OPTIONS = "containerd.runc.v1.CheckpointOptions"
ENDLESS = ("/bin/sh", "-c", "while :; do sleep 0.01; done")
# The least a microVM has.
SMALL = {"io.vmcell.memory-mib": "64"}


def start(shim: Shim, *args: str, **changes: Any) -> None:
    """c1 runs, in a small microVM."""
    shim.create(*(args or ENDLESS), annotations=SMALL, **changes)
    shim.start()


def save(shim: Shim, snapshot_id: str = "s1", *, container_id: str = "c1", **options: Any) -> None:
    """A snapshot of this host. Raises VmcellError."""
    tree = {"snapshot_id": snapshot_id, **options}
    checkpoint(shim, json.dumps(tree).encode(), OWN_OPTIONS, container_id=container_id)


def checkpoint(
    shim: Shim,
    value: bytes = b"",
    kind: str = "",
    *,
    path: str | Path = "",
    container_id: str = "c1",
) -> None:
    """Into the directory `path`, or as the options say. Raises VmcellError."""
    request = task.CheckpointTaskRequest(
        id=container_id,
        path=str(path),
        options=AnyMessage(type_url=kind, value=value) if kind else None,
    )
    shim.call("Checkpoint", request, Empty)


def restore(
    shim: Shim,
    first: Shim,
    snapshot_id: str = "s1",
    *,
    container_id: str = "c2",
    checkpoint: str | Path = "",
    **changes: Any,
) -> int:
    """Create of a container with the root of `first`'s, that goes on from a snapshot of this host
    or from a checkpoint that was laid out. Raises VmcellError."""
    named = {"io.vmcell.snapshot": snapshot_id} if snapshot_id else {}
    words: dict[str, Any] = {
        "root": {"path": str(first.directory / "root")},
        "annotations": {**named, **changes.pop("annotations", {})},
    }
    streams = {name: changes.pop(name, "") for name in ("stdin", "stdout", "stderr")}
    terminal = changes.pop("terminal", False)
    bundle = shim.bundle(["/bin/false"], container_id, **{**words, **changes})
    request = task.CreateTaskRequest(
        id=container_id,
        bundle=str(bundle),
        checkpoint=str(checkpoint),
        terminal=terminal,
        **streams,
    )
    return shim.call("Create", request, task.CreateTaskResponse).pid


def pause(shim: Shim, container_id: str = "c1") -> None:
    shim.call("Pause", task.PauseRequest(id=container_id), Empty)


def resume(shim: Shim, container_id: str = "c1") -> None:
    shim.call("Resume", task.ResumeRequest(id=container_id), Empty)


@contextmanager
def other_shim(first: Shim) -> Iterator[Shim]:
    """One more shim of the same host and configuration."""
    directory = first.directory / "second"
    directory.mkdir(exist_ok=True)
    with shim_in(directory) as shim:
        yield shim


def end(shim: Shim, container_id: str = "c1") -> None:
    """Killed and deleted."""
    shim.kill(container_id=container_id)
    assert shim.wait(container_id=container_id) == 137
    shim.delete(container_id=container_id)


def handle(shim: Shim, container_id: str = "c1") -> FakeVmm:
    """Its VMM's handle."""
    found = shim.registry.container(container_id).guest._handle
    assert isinstance(found, FakeVmm)
    return found


def made(shim: Shim, name: str) -> Path:
    """A new directory beside the shim's."""
    directory = shim.directory / name
    directory.mkdir()
    return directory


def disk_of(shim: Shim, container_id: str) -> Path:
    """Where a container's writes go; `shim` is the first one."""
    return shim.directory / "cache/sandboxes/test" / container_id / "vmcell.ext4"


@contextmanager
def opened(snapshot_id: str) -> Iterator[OpenSnapshot]:
    """A snapshot of this host, every byte of it verified."""
    config = load_config()
    snapshot = open_snapshot(config.snapshot_dir, snapshot_id, snapshot_digests(config))
    try:
        yield snapshot
    finally:
        snapshot.close()


def snapshots(shim: Shim) -> list[str]:
    """The names in the directory of snapshots, hidden ones too; `shim` is the first one."""
    directory = shim.directory / "snapshots"
    return sorted(os.listdir(directory)) if directory.exists() else []
