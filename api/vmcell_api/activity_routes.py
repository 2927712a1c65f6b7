"""What a sandbox does: metrics and logs."""

from __future__ import annotations

from urllib.parse import parse_qsl

import falcon

from vmcell_api.control_plane import ControlPlane
from vmcell_api.identifiers import sandbox_id_of
from vmcell_api.metric_sample import MetricSample
from vmcell_api.query_numbers import query_number
from vmcell_api.sandbox_answers import rfc3339
from vmcell_api.sandbox_logs import entry_answer, first_answer, parse_log_query, select
from vmcell_protos.errors import CallerError

MOST_IDS = 100
# E2B's range ends are seconds; the end of the year 9999 is the last of them with a date.
LAST_S = 253402300799


def metric_answer(sample: MetricSample) -> dict[str, object]:
    """E2B's SandboxMetric."""
    return {
        "timestamp": rfc3339(sample.unix_ms),
        "timestampUnix": sample.unix_ms // 1000,
        "cpuCount": sample.cpu_count,
        "cpuUsedPct": sample.cpu_used_pct,
        "memUsed": sample.mem_used_bytes,
        "memTotal": sample.mem_total_bytes,
        "memCache": sample.mem_cache_bytes,
        "diskUsed": sample.disk_used_bytes,
        "diskTotal": sample.disk_total_bytes,
    }


def parse_range(query_string: str) -> tuple[int, int]:
    """`start` and `end` (unix seconds, the end's whole second included) as milliseconds.

    0 where one is absent; raises CallerError.
    """
    query = dict(parse_qsl(query_string, keep_blank_values=True))
    ends = []
    for name in ("start", "end"):
        ends.append(query_number(name, query.get(name) or "0", range(LAST_S + 1)))
    start_s, end_s = ends
    if query.get("end") and end_s < start_s:
        raise CallerError(f"end is {end_s}, which is before start {start_s}")
    return start_s * 1000, end_s * 1000 + 999 if query.get("end") else 0


def parse_ids(query_string: str) -> list[str]:
    """`sandbox_ids` of `GET /sandboxes/metrics`, joined by commas; raises CallerError."""
    texts = [
        text
        for name, value in parse_qsl(query_string)
        if name == "sandbox_ids"
        for text in value.split(",")
    ]
    if not 1 <= len(texts) <= MOST_IDS:
        raise CallerError(f"sandbox_ids names {len(texts)} sandboxes; it takes 1 to {MOST_IDS}")
    ids = []
    for text in texts:
        sandbox_id = sandbox_id_of(text)
        if sandbox_id is None:
            raise CallerError(f"sandbox_ids names {text[:40]!r}, which is no sandbox id")
        ids.append(sandbox_id)
    return ids


class SandboxMetrics:
    """`/sandboxes/{id}/metrics` and `/sandboxes/metrics`."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_get(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """The samples of a time, oldest first; none of a sandbox that has just started."""
        start_ms, end_ms = parse_range(req.query_string)
        samples = self._control.metrics(
            req.context.team, sandbox_id, start_unix_ms=start_ms, end_unix_ms=end_ms
        )
        resp.media = [metric_answer(sample) for sample in samples]

    def on_get_many(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The newest sample of each; those without one are left out."""
        found = self._control.newest_metrics(req.context.team, parse_ids(req.query_string))
        resp.media = {"sandboxes": {name: metric_answer(row) for name, row in found.items()}}


class SandboxLogs:
    """`/sandboxes/{id}/logs` and `/v2/sandboxes/{id}/logs`."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_get(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """From a moment on, as the CLI asks."""
        query = parse_log_query(req.query_string, version=1)
        entries = self._control.logs(req.context.team, sandbox_id)
        resp.media = first_answer(select(entries, query))

    def on_get_v2(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """By cursor, direction, level and words."""
        query = parse_log_query(req.query_string, version=2)
        entries = self._control.logs(req.context.team, sandbox_id)
        resp.media = {"logs": [entry_answer(entry) for entry in select(entries, query)]}


def add_activity_routes(app: falcon.App, control: ControlPlane) -> None:
    """Adds them to `app`."""
    metrics, logs = SandboxMetrics(control), SandboxLogs(control)
    app.add_route("/sandboxes/metrics", metrics, suffix="many")
    app.add_route("/sandboxes/{sandbox_id}/metrics", metrics)
    app.add_route("/sandboxes/{sandbox_id}/logs", logs)
    app.add_route("/v2/sandboxes/{sandbox_id}/logs", logs, suffix="v2")
