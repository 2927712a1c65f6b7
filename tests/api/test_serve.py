"""The whole service as one command: noded, API, router and nginx around a real containerd."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from own_netns import own_netns
from real_containerd import RealContainerd, real_containerd
from stand_in_images import GOOD, import_stand_ins

pytestmark = pytest.mark.root

PATIENCE_S = 60


@dataclass(frozen=True, kw_only=True)
class Running:
    process: subprocess.Popen[bytes]
    containerd: RealContainerd
    environment: dict[str, str]
    log: Path
    folder: Path


def _ask(
    port: int, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, body=data, headers=named)
        answer = connection.getresponse()
        text = answer.read()
        if answer.headers.get_content_type() == "text/plain":
            return answer.status, {"text": text.decode()}
        return answer.status, json.loads(text) if text else {}
    finally:
        connection.close()


@pytest.fixture
def service() -> Iterator[Running]:
    with (
        tempfile.TemporaryDirectory(prefix="vms") as name,
        own_netns(),
        real_containerd(Path(name, "c")) as containerd,
    ):
        folder = Path(name)
        folder.chmod(0o755)  # the API's user must reach its sockets
        subprocess.run(["ip", "addr", "add", "10.88.0.3/32", "dev", "lo"], check=True)
        import_stand_ins(containerd)
        settings = {
            "database_url": f"sqlite:///{folder}/db/api.sqlite",
            "node_socket": f"{folder}/noded.sock",
            "route_socket": f"{folder}/route.sock",
            "nginx_dir": f"{folder}/nginx",
            "log_format": "json",
            "state_dir": f"{folder}/run",
            "metrics_dir": f"{folder}/metrics",
            "containerd_socket": containerd.socket,
            "runtime": "io.containerd.runc.v2",
            "slot_count": 1,
            "workers": 1,
        }
        config = folder / "api.toml"
        config.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in settings.items()))
        environment = {**os.environ, "VMCELL_API_CONFIG": str(config)}
        log = folder / "serve.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "vmcell_api.serve"]
            process = subprocess.Popen(command, env=environment, stderr=output, stdout=output)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while "API on" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield Running(
                process=process,
                containerd=containerd,
                environment=environment,
                log=log,
                folder=folder,
            )
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            command = [sys.executable, "-m", "vmcell_api.node", "--teardown"]
            subprocess.run(command, env=environment, check=True, timeout=PATIENCE_S)


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found += [int(entry.name), *_children(int(entry.name))]
    return found


def _user(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def _new_key(service: Running, *options: str) -> str:
    command = [sys.executable, "-m", "vmcell_tools", "key", "create", "--team", "one", *options]
    return subprocess.run(
        command, env=service.environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()[-1]


def test_a_sandbox_from_the_key_to_its_end(service: Running) -> None:
    key, admin = _new_key(service), _new_key(service, "--scope", "admin")
    auth = {"X_API_Key": key}
    status, made = _ask(3000, "POST", "/v2/sandboxes", {"templateID": GOOD}, **auth)
    assert status == 201, (made, service.log.read_text())
    ids = {"E2b_Sandbox_Id": made["sandboxID"], "E2b_Sandbox_Port": "49983"}
    assert _ask(3080, "GET", "/health", **ids)[0] == 204
    assert _ask(3080, "POST", "/init", {}, **ids)[0] == 404
    status, body = _ask(3000, "POST", "/v2/sandboxes", {"templateID": GOOD}, **auth)
    assert (status, body["error_code"]) == (503, "sandbox_capacity_unavailable")
    assert len(_ask(3000, "GET", "/v2/sandboxes", **auth)[1]) == 1
    status, page = _ask(3000, "GET", "/metrics", X_API_Key=admin)
    assert status == 200
    for line in (
        *("vmcell_node_up 1.0", "vmcell_sandboxes_running 1.0", "vmcell_slots_free 0.0"),
        'vmcell_sandbox_create_seconds_count{result="ok"} 1.0',
        'vmcell_api_errors_total{code="resource_exhausted"} 1.0',
    ):
        assert line in page["text"].splitlines(), page["text"]
    assert _ask(3000, "DELETE", f"/sandboxes/{made['sandboxID']}", **auth)[0] == 204
    status, body = _ask(3080, "GET", "/health", **ids)
    assert (status, body["message"]) == (502, "The sandbox was not found")
    assert not any(service.containerd.traces().values())

    children = _children(service.process.pid)
    assert {_user(pid) for pid in children} >= {0, 99001}, "API workers gave up root"
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(PATIENCE_S) == 0, service.log.read_text()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    processes = {json.loads(line)["process"] for line in service.log.read_text().splitlines()}
    assert processes == {"vmcell", "noded", "api", "router"}
    assert key not in service.log.read_text()
    assert made["envdAccessToken"] not in service.log.read_text()


def test_the_service_ends_when_a_part_of_it_does(service: Running) -> None:
    nginx = next(
        pid
        for pid in _children(service.process.pid)
        if b"nginx: master" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(nginx, signal.SIGTERM)
    assert service.process.wait(PATIENCE_S) == 1
    assert "nginx ended" in service.log.read_text()
