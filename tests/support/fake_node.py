"""A node that keeps its sandboxes in a dict, for tests of what stands in front of noded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from vmcell_api.egress import Egress
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node.volume_use import VolumeUse
from vmcell_api.node_client import (
    PAUSED,
    RUNNING,
    NewSandbox,
    NodeInfo,
    NodeSnapshot,
    RunningSandbox,
)
from vmcell_api.snapshot_facts import FileChange, SnapshotFile
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_protos.errors import CallerError, HostError, VmcellError

SLOTS = 8
IMAGES = ("docker.io/vmcell/base:latest", "docker.io/vmcell/small:latest", "docker.io/x/y:1")


class FakeNode:
    """`vmcell_api.node_client.NodeVerbs` without a machine; `fail_next` makes one verb fail.

    Volumes are real directories, under `volumes_dir`.
    """

    def __init__(self, *, volumes_dir: str = "/nonexistent") -> None:
        self.volumes = VolumeUse(VolumeFolders(volumes_dir))
        self.address = "127.0.0.1"
        self.running: dict[str, RunningSandbox] = {}
        self.orders: list[NewSandbox] = []
        self.fail_next: VmcellError | None = None
        self.saved: dict[str, NodeSnapshot] = {}
        self.resumes: list[str] = []
        self.on_resume: Callable[[str], None] = lambda sandbox_id: None
        self.samples: dict[str, list[MetricSample]] = {}
        self.logs = b'{"entries": []}'
        self.on_create: Callable[[NewSandbox], None] = lambda order: None
        self._lock = threading.Lock()
        self._clock_ms = time.time_ns() // 1_000_000

    def create(self, sandbox: NewSandbox) -> RunningSandbox:
        self._maybe_fail()
        if sandbox.snapshot_id:
            self._saved(sandbox.snapshot_id)
            assert not sandbox.volume_mounts
        elif sandbox.image not in IMAGES and not sandbox.image.startswith("vmcell.local/build/"):
            raise CallerError(f"image {sandbox.image!r} is not on this node", code="not_found")
        self.volumes.claim(sandbox.sandbox_id, sandbox.volume_mounts)
        self.on_create(sandbox)
        with self._lock:
            self.orders.append(sandbox)
            self._clock_ms += 1  # starts are told apart by their millisecond
            running = RunningSandbox(
                sandbox_id=sandbox.sandbox_id,
                template_id=sandbox.template_id,
                image=sandbox.image,
                vcpus=sandbox.vcpus,
                memory_mib=sandbox.memory_mib,
                disk_mib=1024,
                started_at_unix_ms=self._clock_ms,
                end_at_unix_ms=self._now_ms() + sandbox.timeout_s * 1000,
                address=self.address,
                egress=sandbox.egress,
                volume_mounts=sandbox.volume_mounts,
                pause_on_timeout=sandbox.pause_on_timeout,
                auto_resume=sandbox.auto_resume,
            )
            self.running[sandbox.sandbox_id] = running
        return running

    def kill(self, sandbox_id: str) -> None:
        self._maybe_fail()
        self.get(sandbox_id)
        del self.running[sandbox_id]
        self.volumes.release(sandbox_id)

    def make_volume(self, volume_id: str) -> None:
        self._maybe_fail()
        self.volumes.make(volume_id)

    def remove_volume(self, volume_id: str) -> None:
        self._maybe_fail()
        self.volumes.remove(volume_id)

    def get(self, sandbox_id: str) -> RunningSandbox:
        self._maybe_fail()
        if sandbox_id not in self.running:
            raise CallerError(f"sandbox {sandbox_id} was not found on this node", code="not_found")
        return self.running[sandbox_id]

    def list(self) -> list[RunningSandbox]:
        self._maybe_fail()
        return sorted(self.running.values(), key=lambda running: running.started_at_unix_ms)

    def set_deadline(self, sandbox_id: str, timeout_s: int, *, only_extend: bool) -> RunningSandbox:
        running = self._running(sandbox_id)
        end_at = self._now_ms() + timeout_s * 1000
        if only_extend:
            end_at = max(end_at, running.end_at_unix_ms)
        self.running[sandbox_id] = replace(running, end_at_unix_ms=end_at)
        return self.running[sandbox_id]

    def info(self) -> NodeInfo:
        self._maybe_fail()
        return NodeInfo(containerd_version="0", slot_count=SLOTS, slots_free=self.free())

    def free(self) -> int:
        """How many more may run."""
        return SLOTS - sum(1 for row in self.running.values() if row.state == RUNNING)

    def pause(self, sandbox_id: str) -> RunningSandbox:
        running = self.get(sandbox_id)
        if running.state == PAUSED:
            raise CallerError(f"sandbox {sandbox_id} is paused already", code="aborted")
        self.running[sandbox_id] = replace(running, state=PAUSED)
        return self.running[sandbox_id]

    def resume(
        self, sandbox_id: str, timeout_s: int, *, by_request: bool = False
    ) -> tuple[RunningSandbox, bool]:
        running = self.get(sandbox_id)
        if running.state == RUNNING:
            extended = self.set_deadline(sandbox_id, timeout_s, only_extend=True)
            return (running if by_request else extended), False
        if by_request and not running.auto_resume:
            raise CallerError(f"sandbox {sandbox_id} is paused", code="failed_precondition")
        self.on_resume(sandbox_id)
        if not self.free():
            raise HostError("all slots are in use", code="resource_exhausted")
        self.resumes.append(sandbox_id)
        end_at = self._now_ms() + (timeout_s or 300) * 1000
        self.running[sandbox_id] = replace(running, state=RUNNING, end_at_unix_ms=end_at)
        return self.running[sandbox_id], True

    def make_snapshot(self, sandbox_id: str, snapshot_id: str, *, life_s: int = 0) -> NodeSnapshot:
        running = self._running(sandbox_id)
        made = [row for row in self.saved.values() if row.sandbox_id == sandbox_id]
        row = NodeSnapshot(
            snapshot_id=snapshot_id,
            sandbox_id=sandbox_id,
            template_id=running.template_id,
            vcpus=running.vcpus,
            memory_mib=running.memory_mib,
            created_at_unix_ms=self._now_ms(),
            expires_at_unix_ms=self._now_ms() + life_s * 1000 if life_s else 0,
            parent=made[-1].snapshot_id if made else "",
            size=3,
            allocated=2,
            files=(
                SnapshotFile(name="memory", size=2, allocated=1, digest=f"blake2b:{len(made)}"),
                SnapshotFile(name="disk", size=1, allocated=1, digest="blake2b:0"),
            ),
        )
        self.saved[snapshot_id] = row
        return row

    def snapshots(self, sandbox_id: str = "") -> list[NodeSnapshot]:
        self._maybe_fail()
        return [row for row in self.saved.values() if sandbox_id in ("", row.sandbox_id)]

    def remove_snapshot(self, snapshot_id: str) -> None:
        self._saved(snapshot_id)
        del self.saved[snapshot_id]

    def rollback(
        self, sandbox_id: str, snapshot_id: str, *, undo_life_s: int
    ) -> tuple[RunningSandbox, NodeSnapshot]:
        running = self._running(sandbox_id)
        if self._saved(snapshot_id).sandbox_id != sandbox_id:
            raise CallerError(
                f"snapshot {snapshot_id} is none of sandbox {sandbox_id}", code="not_found"
            )
        undo_id = f"undo-{len(self.saved):020}"
        return running, self.make_snapshot(sandbox_id, undo_id, life_s=undo_life_s)

    def file_changes(self, older_id: str, newer_id: str) -> list[FileChange]:
        self._saved(older_id)
        self._saved(newer_id)
        return [FileChange(path="/a", what="modified", size_before=1, size_after=2)]

    def memory(self, sandbox_id: str) -> dict[str, object]:
        running = self._running(sandbox_id)
        names = ("rss", "pss", "sharedClean", "sharedDirty", "privateClean", "privateDirty", "swap")
        numbers = {f"{name}Bytes": 4096 for name in names}
        process = {"name": "vmm", "pid": 1, "own": numbers, "guestRam": numbers}
        return {"guestMemoryBytes": running.memory_mib << 20, "processes": [process]}

    def _saved(self, snapshot_id: str) -> NodeSnapshot:
        self._maybe_fail()
        if snapshot_id not in self.saved:
            raise CallerError(
                f"snapshot {snapshot_id} was not found on this node", code="not_found"
            )
        return self.saved[snapshot_id]

    def _running(self, sandbox_id: str) -> RunningSandbox:
        running = self.get(sandbox_id)
        if running.state != RUNNING:
            raise CallerError(f"sandbox {sandbox_id} is paused, not running", code="aborted")
        return running

    def set_egress(self, sandbox_id: str, egress: Egress) -> RunningSandbox:
        self.running[sandbox_id] = replace(self._running(sandbox_id), egress=egress)
        return self.running[sandbox_id]

    def metrics(
        self,
        sandbox_ids: Sequence[str],
        *,
        start_unix_ms: int = 0,
        end_unix_ms: int = 0,
        newest_only: bool = False,
    ) -> dict[str, Sequence[MetricSample]]:
        self._maybe_fail()
        end = end_unix_ms or 1 << 62
        found: dict[str, Sequence[MetricSample]] = {}
        for key in self.running.keys() & set(sandbox_ids):
            if self.running[key].state != RUNNING:
                continue
            samples = self.samples.get(key, [])
            inside = [row for row in samples if start_unix_ms <= row.unix_ms <= end]
            found[key] = samples[-1:] if newest_only else inside
        return found

    def envd_logs(self, running: RunningSandbox, access_token: str) -> bytes:
        self._maybe_fail()
        return self.logs

    def _maybe_fail(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error

    @staticmethod
    def _now_ms() -> int:
        return time.time_ns() // 1_000_000
