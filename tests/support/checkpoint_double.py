"""The shim's part of snapshots in the place of a shim that has it not: runc's.

What it keeps of the contract (docs/architecture.md, "Saved sandboxes"): a save stops the task for
real and writes the directory in one step; a task whose container's spec names a snapshot is not
made unless that is whole. The memory is not saved: what starts again is the image's envd.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from vmcell_api.config import ApiConfig
from vmcell_api.node.containerd import Containerd
from vmcell_protos.errors import CallerError
from vmcell_protos.pb.containerd import containers_pb2, tasks_pb2

ANNOTATION = "io.vmcell.snapshot"
_real_create = Containerd.create_task


class CheckpointDouble:
    """Stands at the containerd client's border; `while_saving` runs while the task stands."""

    def __init__(self, config: ApiConfig) -> None:
        self.directory = Path(config.snapshot_dir)
        self.while_saving: Callable[[], None] = lambda: None
        self.saves: list[dict[str, object]] = []

    def install(self, set_attribute: Callable[[object, str, object], None] = setattr) -> None:
        """Replaces the two calls in this process."""
        double = self

        def checkpoint_task(
            self: Containerd, container_id: str, options: bytes, *, timeout_s: float
        ) -> None:
            double.save(self, container_id, json.loads(options))

        def create_task(self: Containerd, container_id: str, mounts: list, *, timeout_s: float):
            double.check(self, container_id)
            return _real_create(self, container_id, mounts, timeout_s=timeout_s)

        set_attribute(Containerd, "checkpoint_task", checkpoint_task)
        set_attribute(Containerd, "create_task", create_task)

    def save(self, daemon: Containerd, container_id: str, options: dict[str, object]) -> None:
        """One save as the shim does it."""
        self.saves.append({**options, "container_id": container_id})
        pause = tasks_pb2.PauseTaskRequest(container_id=container_id)
        daemon.call(daemon._tasks.Pause, pause, f"pausing {container_id}")
        self.while_saving()
        name = str(options["snapshot_id"])
        fresh = self.directory / f".{name}"
        fresh.mkdir()
        contents = {"state.json": b"{}", "memory": os.urandom(16), "disk": b"disk"}
        files = {}
        for file_name, data in contents.items():
            (fresh / file_name).write_bytes(data)
            digest = f"blake2b:{hashlib.blake2b(data).hexdigest()}"
            files[file_name] = {
                "bytes": len(data),
                "allocated_bytes": 4096,
                "digest": digest,
            }
        manifest = {
            "format": 1,
            "created_unix_ns": time.time_ns(),
            "memory_mib": 128,
            "vcpus": 1,
            "container_id": container_id,
            "files": files,
            "parent": "",
        }
        (fresh / "manifest.json").write_text(json.dumps(manifest))
        fresh.rename(self.directory / name)
        if options["then"] == "run":
            daemon.resume_task(container_id)

    def check(self, daemon: Containerd, container_id: str) -> None:
        """Refuses as the shim's Create does."""
        request = containers_pb2.GetContainerRequest(id=container_id)
        record = daemon.call(daemon._containers.Get, request, "looking it up").container
        name = json.loads(record.spec.value)["annotations"].get(ANNOTATION)
        if name is None:
            return
        folder = self.directory / name
        manifest = json.loads((folder / "manifest.json").read_text())
        for file_name, row in manifest["files"].items():
            data = (folder / file_name).read_bytes()
            if f"blake2b:{hashlib.blake2b(data).hexdigest()}" != row["digest"]:
                raise CallerError(
                    f"{file_name} of snapshot {name} is damaged", code="failed_precondition"
                )
