"""The real nginx with our configuration, before the route application and a tiny upstream."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import pytest
from api_service import ApiService, listening

from vmcell_api import route_app
from vmcell_api.nginx import NginxPlan, render
from vmcell_api.node_client import NewSandbox
from vmcell_api.store.records import SandboxRecord

PATIENCE_S = 15
SANDBOX_ID = "i" + "a1" * 9 + "z"
TOKEN = "t0ken"


class Upstream(BaseHTTPRequestHandler):
    """Stands in the guest: tells what arrived, streams, upgrades."""

    protocol_version = "HTTP/1.1"
    release = threading.Event()

    def _answer(self) -> None:
        size = self._drain()
        if self.path.startswith("/stream"):
            self._stream()
            return
        if self.headers.get("Upgrade"):
            self._upgrade()
            return
        told = {
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body_bytes": size,
        }
        body = json.dumps(told).encode()
        self.send_response(403 if self.path == "/own403" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_HEAD = do_OPTIONS = do_DELETE = _answer

    def _drain(self) -> int:
        if self.headers.get("Transfer-Encoding") != "chunked":
            left = size = int(self.headers.get("Content-Length", 0))
            while left:
                left -= len(self.rfile.read(min(left, 65536)))
            return size
        size = 0
        while length := int(self.rfile.readline(), 16):
            size += len(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return size

    def _stream(self) -> None:
        """The second part comes only after the client has shown that it has the first."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        assert self.release.wait(PATIENCE_S)
        self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")

    def _upgrade(self) -> None:
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.end_headers()
        self.wfile.write(self.connection.recv(100).upper())
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@dataclass(frozen=True, kw_only=True)
class DataPlane:
    port: int
    upstream_port: int
    service: ApiService

    def ask(
        self, method: str = "GET", path: str = "/", body: object = None, **headers: str
    ) -> tuple[int, dict, dict[str, str]]:
        """Status, JSON body, headers; underscores in names of `headers` become dashes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named, encode_chunked=False)
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(text) if text else {}, found
        finally:
            connection.close()

    def ids(self, port: int | None = None) -> dict[str, str]:
        """The routing headers."""
        return {
            "E2b_Sandbox_Id": SANDBOX_ID,
            "E2b_Sandbox_Port": str(port or self.upstream_port),
        }


@pytest.fixture(scope="module")
def upstream_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.fixture
def plane(service: ApiService, upstream_port: int, tmp_path: Path) -> Iterator[DataPlane]:
    _add_sandbox(service)
    port = _free_port()
    folder = tmp_path / "nginx"
    folder.mkdir()
    with listening(service.route_app) as route:
        plan = NginxPlan(
            listen=f"127.0.0.1:{port}",
            route_socket="ROUTE",
            folder=str(folder),
            user="root" if os.geteuid() == 0 else "",
        )
        config = folder / "nginx.conf"
        config.write_text(render(plan).replace("unix:ROUTE", route))
        nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        assert nginx, "needs nginx; install nginx-light"
        process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(config)])
        try:
            _wait_for_port(port, process)
            yield DataPlane(port=port, upstream_port=upstream_port, service=service)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _add_sandbox(service: ApiService) -> None:
    team = service.store.ensure_team("team-one")
    record = SandboxRecord(
        sandbox_id=SANDBOX_ID,
        team_id=team.team_id,
        template_id="base",
        access_token=TOKEN,
        metadata={},
        created_at_unix_ms=0,
    )
    service.store.add_sandbox(record, limit=9, live=())
    order = NewSandbox(
        sandbox_id=SANDBOX_ID,
        template_id="base",
        image="docker.io/vmcell/base:latest",
        vcpus=1,
        memory_mib=64,
        timeout_s=60,
    )
    service.node.create(order)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "nginx ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_by_headers_and_by_host(plane: DataPlane) -> None:
    status, told, _ = plane.ask("GET", "/a%20b//c?q=1", **plane.ids())
    assert (status, told["path"]) == (200, "/a%20b//c?q=1")
    host = f"{plane.upstream_port}-{SANDBOX_ID}.sbx.localhost:8443"
    status, told, _ = plane.ask("GET", "/x", Host=host)
    assert (status, told["headers"]["host"]) == (200, host)


def test_the_platforms_credentials_stay_outside(plane: DataPlane) -> None:
    _, told, _ = plane.ask(
        "GET", "/", X_API_Key="e2b_00", Authorization="Bearer e2b_00",
        E2B_Traffic_Access_Token="t", X_Access_Token="envd", **plane.ids(),
    )  # fmt: skip
    assert not {"x-api-key", "authorization", "e2b-traffic-access-token"} & set(told["headers"])
    assert told["headers"]["x-access-token"] == "envd"
    for own in ("Basic dXNlcjo=", "Bearer of-my-own-app"):
        _, told, _ = plane.ask("GET", "/", Authorization=own, **plane.ids())
        assert told["headers"]["authorization"] == own


def test_unknown_closed_and_malformed(plane: DataPlane) -> None:
    status, body, headers = plane.ask(E2b_Sandbox_Id="i" + "0" * 19, E2b_Sandbox_Port="80")
    assert (status, body["message"]) == (502, "The sandbox was not found")
    assert body["code"] == 502
    assert headers["content-type"].startswith("application/json")
    closed = _free_port()
    status, body, _ = plane.ask("POST", "/x", body=b"y" * 100, **plane.ids(closed))
    assert (status, body["port"]) == (502, closed)
    assert body["message"] == "The sandbox is running but port is not open"
    assert body["sandboxId"] == SANDBOX_ID
    for bad in (
        {"E2b_Sandbox_Id": "../../x", "E2b_Sandbox_Port": "80"},
        {"E2b_Sandbox_Id": SANDBOX_ID, "E2b_Sandbox_Port": "99999"},
        {"E2b_Sandbox_Id": SANDBOX_ID},
        {"Host": f"0-{SANDBOX_ID}.x"},
        {"Host": "80-short.x"},
        {},
    ):
        status, body, _ = plane.ask(**bad)
        assert (status, body["code"]) == (400, 400), bad


def test_the_guests_own_errors_pass(plane: DataPlane) -> None:
    status, told, _ = plane.ask("GET", "/own403", **plane.ids())
    assert (status, told["path"]) == (403, "/own403")


def test_envds_internal_paths_are_closed(plane: DataPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/init", "//init", "/%69nit", "/x/../init", "/./freeze", "/init?x", "/INIT/"):
        status, body, _ = plane.ask("POST", path, body=b"{}", **plane.ids(49983))
        assert (status, body["code"]) == (404, 404), path
    status, told, _ = plane.ask("GET", "/init", **plane.ids())
    assert (status, told["path"]) == (200, "/init"), "other ports are the user's own"


def test_nothing_is_buffered(plane: DataPlane) -> None:
    Upstream.release.clear()
    connection = http.client.HTTPConnection("127.0.0.1", plane.port, timeout=PATIENCE_S)
    named = {name.replace("_", "-"): value for name, value in plane.ids().items()}
    connection.request("GET", "/stream", headers=named)
    answer = connection.getresponse()
    assert answer.read(5) == b"first"
    Upstream.release.set()
    assert answer.read() == b"second"
    connection.close()


def test_large_and_chunked_bodies(plane: DataPlane) -> None:
    size = 8 << 20
    _, told, _ = plane.ask("POST", "/up", body=bytes(size), **plane.ids())
    assert told["body_bytes"] == size
    connection = http.client.HTTPConnection("127.0.0.1", plane.port, timeout=PATIENCE_S)
    named = {name.replace("_", "-"): value for name, value in plane.ids().items()}
    connection.request("POST", "/up", iter([b"x" * 1000] * 10), named, encode_chunked=True)
    told = json.loads(connection.getresponse().read())
    assert told["body_bytes"] == 10000
    connection.close()


def test_websockets_pass(plane: DataPlane) -> None:
    with socket.create_connection(("127.0.0.1", plane.port), timeout=PATIENCE_S) as client:
        client.sendall(
            f"GET /ws HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: {SANDBOX_ID}\r\n"
            f"E2b-Sandbox-Port: {plane.upstream_port}\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1000)
        assert head.startswith(b"HTTP/1.1 101")
        client.sendall(b"frames")
        assert client.recv(100) == b"FRAMES"


def _signed_path(operation: str, token: str = TOKEN, path: str = "/tmp/a b") -> str:
    digest = hashlib.sha256(f"{path}:{operation}:user:{token}:99".encode()).digest()
    signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
    query = {"path": path, "username": "user", "signature_expiration": "99"}
    return "/files?" + urlencode({**query, "signature": signature})


def test_signed_urls_name_no_sandbox(plane: DataPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_app, "ENVD_PORT", plane.upstream_port)
    assert plane.ask("GET", _signed_path("read"))[0] == 200
    assert plane.ask("POST", _signed_path("write"), body=b"x")[0] == 200
    status, body, _ = plane.ask("GET", _signed_path("write"))
    assert (status, body["message"]) == (401, "invalid signature")
    assert plane.ask("GET", _signed_path("read", token="other"))[0] == 401
    plane.service.node.kill(SANDBOX_ID)
    assert plane.ask("GET", _signed_path("read"))[0] == 401


def test_signature_tries_are_limited(plane: DataPlane) -> None:
    statuses = {plane.ask("GET", _signed_path("read", token="other"))[0] for _ in range(60)}
    assert statuses == {401, 429}


def test_a_browsers_preflight_names_no_sandbox(plane: DataPlane) -> None:
    status, _, headers = plane.ask(
        "OPTIONS", "/process.Process/Start", Origin="http://a",
        Access_Control_Request_Method="POST", Access_Control_Request_Headers="e2b-sandbox-id",
    )  # fmt: skip
    assert status == 204
    assert headers["access-control-allow-origin"] == "*"
    assert headers["access-control-allow-headers"] == "e2b-sandbox-id"


def test_the_router_is_down(plane: DataPlane) -> None:
    from vmcell_api.node_client import NodeUnreachable

    plane.service.node.fail_next = NodeUnreachable("no noded")
    status, body, _ = plane.ask(**plane.ids())
    assert (status, body["code"]) == (503, 503)
