"""The whole service as one command: noded, API, router and nginx around a real containerd."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in_images import GOOD
from whole_service import PATIENCE_S, WholeService, ask, children_of, whole_service

pytestmark = pytest.mark.root


@pytest.fixture
def service() -> Iterator[WholeService]:
    with whole_service() as running:
        yield running


def _create_chunked(key: str) -> tuple[int, bytes]:
    """A create through nginx whose body has no length; there is no slot for it."""
    connection = http.client.HTTPConnection("127.0.0.1", 3080, timeout=PATIENCE_S)
    headers = {"Host": "api.sbx.localhost", "X-API-Key": key}
    body = iter([b'{"templateID": ', json.dumps(GOOD).encode(), b"}"])
    connection.request("POST", "/v2/sandboxes", body, headers, encode_chunked=True)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def _user(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_a_sandbox_from_the_key_to_its_end(service: WholeService) -> None:
    assert service.systemd.recv(100) == b"READY=1"
    service.systemd.setblocking(False)
    key = service.new_key()
    auth = {"X_API_Key": key}
    status, made = ask(3000, "POST", "/v2/sandboxes", {"templateID": GOOD}, **auth)
    assert status == 201, (made, service.log.read_text())
    ids = {"E2b_Sandbox_Id": made["sandboxID"], "E2b_Sandbox_Port": "49983"}
    assert ask(3080, "GET", "/health", **ids)[0] == 204
    assert ask(3080, "POST", "/init", {}, **ids)[0] == 404
    status, body = ask(3000, "POST", "/v2/sandboxes", {"templateID": GOOD}, **auth)
    assert (status, body["error_code"]) == (503, "sandbox_capacity_unavailable")
    assert len(ask(3000, "GET", "/v2/sandboxes", **auth)[1]) == 1
    status, page = ask(3000, "GET", "/metrics", X_API_Key=service.new_key("--scope", "admin"))
    assert status == 200
    for line in (
        *("vmcell_node_up 1.0", "vmcell_sandboxes_running 1.0", "vmcell_slots_free 0.0"),
        'vmcell_sandbox_create_seconds_count{result="ok"} 1.0',
        'vmcell_api_errors_total{code="resource_exhausted"} 1.0',
    ):
        assert line in page["text"].splitlines(), page["text"]
    auth["Host"] = "api.sbx.localhost"
    assert len(ask(3080, "GET", "/v2/sandboxes", **auth)[1]) == 1
    assert _create_chunked(key)[0] == 503, "JavaScript sends its bodies so"
    del auth["Host"]
    assert ask(3000, "DELETE", f"/sandboxes/{made['sandboxID']}", **auth)[0] == 204
    status, body = ask(3080, "GET", "/health", **ids)
    assert (status, body["message"]) == (502, "The sandbox was not found")
    assert not any(service.containerd.traces().values())

    with pytest.raises(BlockingIOError):
        service.systemd.recv(100)  # nobody else spoke for the service

    children = children_of(service.process.pid)
    assert {_user(pid) for pid in children} >= {0, 99001, 99002}, "workers gave up root"
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(PATIENCE_S) == 0, service.log.read_text()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    processes = {json.loads(line)["process"] for line in service.log.read_text().splitlines()}
    assert processes == {"vmcell", "noded", "api", "router"}
    assert key not in service.log.read_text()
    assert made["envdAccessToken"] not in service.log.read_text()


def test_a_place_that_is_taken_is_named(service: WholeService) -> None:
    command = [sys.executable, "-m", "vmcell_api.serve"]
    again = subprocess.run(
        command,
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (again.returncode, "api_bind 127.0.0.1:3000 is taken" in again.stderr) == (1, True)
    assert service.process.poll() is None, "the first one goes on"


def test_the_parts_end_with_a_service_that_is_killed(service: WholeService) -> None:
    """Else the next start would find ports and locks taken."""
    children = children_of(service.process.pid)
    os.kill(service.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, service.log.read_text()
        time.sleep(0.05)


def test_unknown_words_are_refused() -> None:
    command = [sys.executable, "-m", "vmcell_api.serve", "--what"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "usage" in done.stderr) == (2, True)
