"""What operators measure, for Prometheus.

The workers count in files of their own that whoever is asked adds up (prometheus_client's
multiprocess mode); what the node knows is asked of it at each scrape. Without a folder the counts
are this process's alone, which is what tests want.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vmcell_api.node_client import PAUSED, NodeVerbs
from vmcell_protos.errors import HostError, VmcellError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CREATE_BUCKETS_S = (0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


def prepare(folder: str, owner_uid: int) -> None:
    """Makes a folder without earlier counts for the workers; before they fork. Raises HostError.

    Imports prometheus_client, which reads the folder's name once.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        for old in path.glob("*.db"):
            old.unlink()
        if os.geteuid() == 0:
            os.chown(path, owner_uid, owner_uid)
    except OSError as error:
        raise HostError(f"cannot make metrics_dir {folder}: {error}; name another") from error
    if "prometheus_client" in sys.modules:
        raise HostError("prometheus_client was imported too early: workers would not be added up")
    os.environ[FOLDER_VARIABLE] = folder
    import prometheus_client  # noqa: F401  # before the workers give up root


class Metrics:
    """The counters of one application; thread-safe. `folder` is the one that was prepared."""

    def __init__(self, node: NodeVerbs, folder: str = "") -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._folder = folder
        self._node_view = _NodeView(node)
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vmcell_api_requests",
            "Requests by route, method and status.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._errors = Counter(
            "vmcell_api_errors",
            "Requests that were refused or failed, by error code.",
            ("code",),
            registry=self._registry,
        )
        self._durations = Histogram(
            "vmcell_api_request_duration_seconds",
            "From the request's headers to its answer.",
            ("method",),
            buckets=REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._creates = Histogram(
            "vmcell_sandbox_create_seconds",
            "Creates of sandboxes, from the request's headers to its answer.",
            ("result",),
            buckets=CREATE_BUCKETS_S,
            registry=self._registry,
        )

    def count(
        self, *, route: str, method: str, status: int, code: str, duration_s: float, creates: bool
    ) -> None:
        """One request; `code` "ok" or an error's, `route` "" for none of ours."""
        self._requests.labels(route or "none", method, str(status)).inc()
        self._durations.labels(method).observe(duration_s)
        if code != "ok":
            self._errors.labels(code).inc()
        if creates:
            self._creates.labels("ok" if code == "ok" else "failed").observe(duration_s)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        node = CollectorRegistry()
        node.register(self._node_view)
        if not self._folder:
            return generate_latest(self._registry) + generate_latest(node)
        counts: CollectorRegistry = CollectorRegistry()
        MultiProcessCollector(counts, path=self._folder)
        return generate_latest(counts) + generate_latest(node)


class _NodeView:
    """A collector that asks the node at each scrape."""

    def __init__(self, node: NodeVerbs) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """The node's gauges; only `vmcell_node_up 0` when it does not answer."""
        from prometheus_client.core import GaugeMetricFamily

        try:
            info, here = self._node.info(), self._node.list()
            snapshots = self._node.snapshots()
        except VmcellError:
            yield GaugeMetricFamily("vmcell_node_up", "Whether noded answers.", value=0)
            return
        yield GaugeMetricFamily("vmcell_node_up", "Whether noded answers.", value=1)
        paused = sum(1 for sandbox in here if sandbox.state == PAUSED)
        yield GaugeMetricFamily(
            "vmcell_sandboxes_running", "Running sandboxes.", value=len(here) - paused
        )
        yield GaugeMetricFamily("vmcell_sandboxes_paused", "Paused sandboxes.", value=paused)
        yield GaugeMetricFamily(
            "vmcell_snapshots", "Snapshots that clients may name.", value=len(snapshots)
        )
        yield GaugeMetricFamily(
            "vmcell_snapshot_allocated_bytes",
            "Bytes of these snapshots on disk; what several share is counted in each.",
            value=sum(row.allocated for row in snapshots),
        )
        yield GaugeMetricFamily("vmcell_slots", "Network slots.", value=info.slot_count)
        yield GaugeMetricFamily("vmcell_slots_free", "Free network slots.", value=info.slots_free)
