"""Prometheus' page: what is counted, by whom it is seen, and several processes added up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from api_service import ApiService
from falcon import testing
from prometheus_client.parser import text_string_to_metric_families

from vmcell_api import metrics
from vmcell_protos.errors import HostError

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _samples(page: bytes) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def _page(service: ApiService) -> Samples:
    client = testing.TestClient(service.app)
    key = service.new_key("operators", "admin")
    answer = client.simulate_get("/metrics", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return _samples(answer.content)


def _of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_only_for_the_operator(service: ApiService) -> None:
    client = testing.TestClient(service.app)
    assert client.simulate_get("/metrics").status_code == 401
    headers = {"X-API-KEY": service.key}
    assert client.simulate_get("/metrics", headers=headers).status_code == 403


def test_what_is_counted(service: ApiService) -> None:
    client = testing.TestClient(service.app, headers={"X-API-KEY": service.key})
    for _ in range(2):
        client.simulate_post("/v2/sandboxes", json={"templateID": "base"})
    client.simulate_post("/v2/sandboxes", json={"templateID": "nothing"})
    client.simulate_get("/no/such/route")
    client.simulate_get("/sandboxes/" + "i" * 20)
    samples = _page(service)
    route = {"route": "/v2/sandboxes", "method": "POST"}
    assert _of(samples, "vmcell_api_requests_total", **route, status="201") == 2
    assert _of(samples, "vmcell_api_requests_total", **route, status="404") == 1
    none = {"route": "none", "method": "GET", "status": "404"}
    assert _of(samples, "vmcell_api_requests_total", **none) == 1
    assert _of(samples, "vmcell_api_errors_total", code="not_found") == 3
    assert _of(samples, "vmcell_sandbox_create_seconds_count", result="ok") == 2
    assert _of(samples, "vmcell_sandbox_create_seconds_count", result="failed") == 1
    assert _of(samples, "vmcell_sandboxes_running") == 2
    assert _of(samples, "vmcell_slots") == 8
    assert _of(samples, "vmcell_slots_free") == 6
    assert _of(samples, "vmcell_node_up") == 1


def test_a_page_without_the_node(service: ApiService) -> None:
    service.node.fail_next = HostError("no noded")
    samples = _page(service)
    assert _of(samples, "vmcell_node_up") == 0
    assert not [name for name, _ in samples if name == "vmcell_slots_free"]


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_methods_that_clients_make_up_are_one_label(service: ApiService) -> None:
    client = testing.TestClient(service.app)
    for number in range(5):
        client.simulate_request(f"M{number}", "/health")
    labels = {dict(pairs).get("method") for _, pairs in _page(service)}
    assert not [label for label in labels if label and label.startswith("M")]


# prometheus_client reads its folder when it is imported, so the service is a process of its own:
# it prepares, forks its workers, and one who has counted nothing answers.
SERVICE = """
import multiprocessing, os, sys
from fake_node import FakeNode
from vmcell_api import metrics

def work(number):
    counted = metrics.Metrics(FakeNode(), sys.argv[1])
    for _ in range(number):
        counted.count(route="/r", method="GET", status=200, code="ok", duration_s=1, creates=True)

metrics.prepare(sys.argv[1], os.getuid())
context = multiprocessing.get_context("fork")
workers = [context.Process(target=work, args=(number,)) for number in (3, 4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(30)
sys.stdout.buffer.write(metrics.Metrics(FakeNode(), sys.argv[1]).render())
"""


def test_workers_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").write_bytes(b"of an earlier service")
    (tmp_path / "mine.txt").write_text("not ours")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    page = subprocess.run(
        [sys.executable, "-c", SERVICE, str(tmp_path)],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout
    samples = _samples(page)
    route = {"route": "/r", "method": "GET", "status": "200"}
    assert _of(samples, "vmcell_api_requests_total", **route) == 7
    assert _of(samples, "vmcell_sandbox_create_seconds_count", result="ok") == 7
    assert _of(samples, "vmcell_slots_free") == 8
    assert (tmp_path / "mine.txt").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="metrics_dir"):
        metrics.prepare(str(tmp_path / "file" / "m"), os.getuid())
