"""A session under gunicorn with a secret in every field: its logs hold none.

The same processes show that counts and rates are those of all workers together.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vmcell_api.identifiers import new_api_key
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.store.teams import Teams
from vmcell_api.tenancy import create_key

PATIENCE_S = 30
SECRET = "hunter2"
SERVER = """
import os, sys
from fake_builder import FakeBuilder
from fake_node import FakeNode
from vmcell_api import logs, metrics
from vmcell_api.app import create_app
from vmcell_api.config import ApiConfig
from vmcell_api.request_rate import RequestRates
from vmcell_api.store.database import open_engine
from vmcell_api.store.records import Store
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.token import load_tokens
from vmcell_api.web_server import WebServer, serve

bind, url, folder, log_format = sys.argv[1:]
config = ApiConfig(
    database_url=url,
    requests_per_s=100_000,
    upload_dir=f"{folder}-uploads",
    volumes_dir=f"{folder}-volumes",
)
folders = VolumeFolders(config.volumes_dir)
folders.prepare()
tokens = load_tokens(folders.key_path)
logs.set_up("api", log_format)
metrics.prepare(folder, os.getuid())
rates = RequestRates()

def make_app():
    node = FakeNode(volumes_dir=config.volumes_dir)
    def fail(order):
        if "boom" in order.environment:
            raise ValueError(f"cannot take {order.environment} {order.access_token}")
    node.on_create = fail
    return create_app(
        Store(open_engine(url)),
        node,
        config,
        volume_tokens=tokens,
        builds=FakeBuilder(),
        rates=rates,
        metrics_dir=folder,
    )

serve(WebServer(name="t", bind=bind, workers=3, threads=4), make_app)
"""


@dataclass(frozen=True, kw_only=True)
class Running:
    port: int
    log: Path
    key: str
    admin: str
    store: Store

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        """A connection of its own, so that any worker may get it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            named = {"X-API-Key": self.key}
            named |= {name.replace("_", "-"): value for name, value in headers.items()}
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, body=data, headers=named)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def send(self, raw: bytes) -> bytes:
        """Bytes that are perhaps no HTTP; what comes back, to its end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as client:
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            while part := client.recv(65536):
                answer += part
            return answer


@pytest.fixture
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"sqlite:///{tmp_path}/db/api.sqlite"
    migrate(url)
    store = Store(open_engine(url))
    key, _ = create_key(store, store.ensure_team("one"), scopes=["*"])
    admin, _ = create_key(store, store.ensure_team("operators"), scopes=["admin"])
    log = tmp_path / "log"
    log_format = getattr(request, "param", "json")
    arguments = [f"127.0.0.1:{port}", url, str(tmp_path / "metrics"), log_format]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *arguments],
            stderr=output,
            stdout=output,
            env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        )
    started = Running(port=port, log=log, key=key, admin=admin, store=store)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _is_well(started):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        yield started
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
        store.close()


def _is_well(running: Running) -> bool:
    try:
        return running.ask("GET", "/health")[0] == 200
    except ConnectionRefusedError:
        return False


def _session(running: Running, tokens: list[str]) -> None:
    """Every call and every kind of failure, with the secret wherever a client can put one."""
    body = {
        "templateID": "base",
        "metadata": {SECRET: SECRET},
        "envVars": {SECRET: SECRET},
        SECRET: SECRET,
    }
    status, answer = running.ask("POST", "/v2/sandboxes", body)
    assert status == 201, answer
    made = json.loads(answer)
    tokens.append(made["envdAccessToken"])
    path = f"/sandboxes/{made['sandboxID']}"
    for method, tail, data in (
        ("GET", "", None),
        ("POST", "/timeout", {"timeout": SECRET}),
        ("POST", "/connect", {"timeout": 5, SECRET: SECRET}),
        ("DELETE", "", None),
    ):
        if method == "DELETE":
            _below_sandboxes(running, path)
        running.ask(method, path + tail, data, X_Request_Id=SECRET, User_Agent=SECRET)
    _templates(running, tokens)
    _volumes(running, tokens)
    failing = {"templateID": "base", "envVars": {"boom": SECRET}}
    assert running.ask("POST", "/v2/sandboxes", failing)[0] == 500
    running.ask("POST", "/v2/sandboxes", {"templateID": SECRET})
    running.ask("POST", "/v2/sandboxes", {"templateID": "base", "mcp": {SECRET: SECRET}})
    running.ask("GET", f"/v2/sandboxes?metadata={SECRET}&nextToken={SECRET}&{SECRET}=1")
    running.ask("GET", f"/sandboxes/{SECRET}")
    running.ask("DELETE", f"/{SECRET}/{running.key}")
    running.ask("GET", f"/sandboxes/{running.key}")
    running.ask("GET", "/teams", X_API_Key="", Authorization=f"Bearer {running.key}")
    running.ask("GET", "/v2/sandboxes", X_API_Key=SECRET)
    running.ask("POST", "/vmcell/teams", {"name": f"/{SECRET}"}, X_API_Key=running.admin)
    status, answer = running.ask("POST", "/vmcell/teams/one/keys", {}, X_API_Key=running.admin)
    tokens.append(json.loads(answer)["key"])
    head = f"POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {running.key}\r\n"
    for rest in (
        f"{SECRET} : {running.key}\r\n\r\n",
        f"Content-Length: {SECRET}\r\n\r\n",
        f"Transfer-Encoding: chunked\r\n\r\n{SECRET}\r\n",
        f"Transfer-Encoding: chunked\r\n\r\n5\r\n{SECRET}",
        f'Content-Length: 50\r\n\r\n{{"{SECRET}',
    ):
        running.send((head + rest).encode())
    running.send(f"{SECRET} {running.key}\r\n\r\n".encode())
    running.send(f"GET /{SECRET} HTTP/9.{SECRET}\r\n\r\n".encode())


def _below_sandboxes(running: Running, path: str) -> None:
    for tail in ("/pause", "/resume", "/snapshots", "/fork", "/rollback"):
        running.ask("POST", path + tail, {"memory": SECRET, "name": SECRET, "count": SECRET})
    running.ask("PUT", f"{path}/network", {"allowOut": [SECRET], "rules": SECRET})
    running.ask("PUT", f"{path}/network", {"allowOut": [SECRET]})
    for question in ("metrics?start=", "logs?start=", "logs?search="):
        running.ask("GET", f"{path}/{question}{SECRET}")
    running.ask("GET", f"/v2{path}/logs?level={SECRET}&search={SECRET}")
    running.ask("GET", f"/sandboxes/metrics?sandbox_ids={SECRET}")
    running.ask("GET", f"/snapshots?name={SECRET}&nextToken={SECRET}")


def _templates(running: Running, tokens: list[str]) -> None:
    """A build with a registry's password in it, and an upload whose link is a secret."""
    status, answer = running.ask("POST", "/v3/templates", {"name": "x", SECRET: SECRET})
    assert status == 202, answer
    made = json.loads(answer)
    template = f"/templates/{made['templateID']}"
    build = f"{template}/builds/{made['buildID']}"
    status, answer = running.ask("GET", f"{template}/files/{'ab' * 32}")
    assert status == 201, answer
    link = urlsplit(json.loads(answer)["url"]).path
    tokens.append(link.rpartition("/")[2])
    assert running.ask("PUT", link, {SECRET: SECRET})[0] == 200
    running.ask("PUT", link)
    running.ask("PUT", f"{link}{SECRET}", {SECRET: SECRET})
    login = {"type": "registry", "username": SECRET, "password": SECRET}
    start = {
        "fromImage": f"registry.example/{SECRET}",
        "fromImageRegistry": login,
        "steps": [{"type": "ENV", "args": [SECRET, SECRET]}],
        "startCmd": SECRET,
        "readyCmd": SECRET,
    }
    running.ask("POST", f"/v2{build}", {**start, "steps": [{"type": SECRET}]})
    for text in (SECRET, f'{{"{SECRET}'):
        account = {"type": "gcp", "serviceAccountJson": text}
        running.ask("POST", f"/v2{build}", {**start, "fromImageRegistry": account})
    assert running.ask("POST", f"/v2{build}", start)[0] == 202
    running.ask("POST", f"/v2{build}", start)
    running.ask("GET", f"{build}/status?level={SECRET}")
    running.ask("GET", f"{build}/logs?cursor={SECRET}")
    running.ask("POST", "/templates/tags", {"target": SECRET, "tags": [SECRET]})
    running.ask("GET", f"/templates/aliases/{SECRET}")
    running.ask("DELETE", f"/templates/{SECRET}")


def _volumes(running: Running, tokens: list[str]) -> None:
    status, answer = running.ask("POST", "/volumes", {"name": "x", SECRET: SECRET})
    assert status == 201, answer
    tokens.append(json.loads(answer)["token"])
    running.ask("POST", "/volumes", {"name": "x", "driver": SECRET})
    running.ask("POST", "/volumes", {"name": f"/{SECRET}"})
    running.ask("DELETE", f"/volumes/{SECRET}")


@pytest.mark.parametrize("running", ["json", "text"], indirect=True)
def test_a_session_leaves_no_secret_in_the_logs(running: Running) -> None:
    tokens = [running.key, running.admin]
    _session(running, tokens)
    text = running.log.read_text()
    lines = [line for line in text.splitlines() if line]
    for secret in (SECRET, *tokens):
        assert [line for line in lines if secret in line] == []
    assert "ValueError at " in text
    with running.store.engine.connect() as connection:
        audit = str(connection.exec_driver_sql("SELECT * FROM audit").all())
    assert not [secret for secret in (SECRET, *tokens) if secret in audit]
    if lines[0].startswith("{"):
        _assert_fields([json.loads(line) for line in lines])
    else:
        assert re.search(r"api: INFO answered \[request_id=\w+ team_id=\S+ key_id=k\w+", text)


def _assert_fields(records: list[dict]) -> None:
    """Every line is JSON; those of requests can be told apart and put together."""
    assert {"time", "level", "process", "logger", "message"} <= set.intersection(*map(set, records))
    requests = [record for record in records if record["logger"] == "vmcell.api.request"]
    assert len({record["request_id"] for record in requests}) == len(requests)
    (made,) = [row for row in requests if row["status"] == 201 and row["route"] == "/v2/sandboxes"]
    assert re.fullmatch(r"[a-z0-9]{20}", made["sandbox_id"])
    assert made["team_id"]
    assert made["key_id"]
    assert made["duration_ms"] > 0
    (failed,) = [row for row in requests if row["status"] == 500]
    same = [row for row in records if row.get("request_id") == failed["request_id"]]
    assert [row["level"] for row in same] == ["error", "info"]


def test_counts_rates_and_revocations_are_those_of_all_workers(running: Running) -> None:
    for _ in range(30):
        assert running.ask("GET", "/v2/sandboxes")[0] == 200
    status, page = running.ask("GET", "/metrics", X_API_Key=running.admin)
    assert status == 200
    found = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(page.decode())
        if family.name == "vmcell_api_requests"
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert found["/v2/sandboxes", "200"] == 30

    teams = Teams(running.store.engine)
    teams.change_limits(teams.find("one").team_id, {"requests_per_s": 1})
    begun = time.monotonic()
    statuses = [running.ask("GET", "/v2/sandboxes")[0] for _ in range(12)]
    lasted_s = time.monotonic() - begun
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= 2 + lasted_s + 1, "three workers, one limit"
    assert running.ask("GET", "/v2/sandboxes", X_API_Key=new_api_key())[0] == 401
