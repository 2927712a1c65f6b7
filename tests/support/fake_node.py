"""A node that keeps its sandboxes in a dict, for tests of what stands in front of noded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from vmcell_api.egress import Egress
from vmcell_api.metric_sample import MetricSample
from vmcell_api.node.volume_use import VolumeUse
from vmcell_api.node_client import NewSandbox, NodeInfo, RunningSandbox
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_protos.errors import CallerError, VmcellError

IMAGES = ("docker.io/vmcell/base:latest", "docker.io/vmcell/small:latest", "docker.io/x/y:1")


class FakeNode:
    """`vmcell_api.node_client.NodeVerbs` without a machine; `fail_next` makes one verb fail.

    Volumes are real directories, under `volumes_dir`.
    """

    def __init__(self, address: str = "127.0.0.1", *, volumes_dir: str = "/nonexistent") -> None:
        self.volumes = VolumeUse(VolumeFolders(volumes_dir))
        self.address = address
        self.running: dict[str, RunningSandbox] = {}
        self.orders: list[NewSandbox] = []
        self.fail_next: VmcellError | None = None
        self.samples: dict[str, list[MetricSample]] = {}
        self.logs = b'{"entries": []}'
        self.on_create: Callable[[NewSandbox], None] = lambda order: None
        self._lock = threading.Lock()
        self._clock_ms = time.time_ns() // 1_000_000

    def create(self, sandbox: NewSandbox) -> RunningSandbox:
        self._maybe_fail()
        if sandbox.image not in IMAGES and not sandbox.image.startswith("vmcell.local/build/"):
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
        running = self.get(sandbox_id)
        end_at = self._now_ms() + timeout_s * 1000
        if only_extend:
            end_at = max(end_at, running.end_at_unix_ms)
        self.running[sandbox_id] = replace(running, end_at_unix_ms=end_at)
        return self.running[sandbox_id]

    def info(self) -> NodeInfo:
        self._maybe_fail()
        return NodeInfo(containerd_version="0", slot_count=8, slots_free=8 - len(self.running))

    def set_egress(self, sandbox_id: str, egress: Egress) -> RunningSandbox:
        self.running[sandbox_id] = replace(self.get(sandbox_id), egress=egress)
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
