"""The real nginx with our configuration, before the route application, the API and a fake guest."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from api_service import ApiService, listening

from vmcell_api.nginx import NginxPlan, Tls, render
from vmcell_api.nginx_files import nginx_program, nginx_version
from vmcell_api.node_client import NewSandbox
from vmcell_api.store.records import SandboxRecord
from vmcell_tools.local_ca import TlsFiles

PATIENCE_S = 30
SANDBOX_ID = "i" + "a1" * 9 + "z"
TOKEN = "t0ken"


@dataclass(frozen=True, kw_only=True)
class DataPlane:
    """`port` is nginx's, `tls_port` the one with TLS (0: none), `upstream_port` the guest's."""

    port: int
    upstream_port: int
    service: ApiService
    tls_port: int = 0
    api_url: str = ""
    authority: Path | None = None

    def ask(
        self, method: str = "GET", path: str = "/", body: object = None, **headers: str
    ) -> tuple[int, dict, dict[str, str]]:
        """Status, JSON body, headers; underscores in names of `headers` become dashes."""
        status, text, found = self.ask_raw(method, path, body, **headers)
        return status, json.loads(text) if text else {}, found

    def ask_raw(
        self, method: str = "GET", path: str = "/", body: object = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Like `ask`, with the body as it came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named, encode_chunked=False)
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, text, found
        finally:
            connection.close()

    def ids(self, port: int | None = None) -> dict[str, str]:
        """The routing headers."""
        return {
            "E2b_Sandbox_Id": SANDBOX_ID,
            "E2b_Sandbox_Port": str(port or self.upstream_port),
        }

    def tls_context(self) -> ssl.SSLContext:
        """Trusts the plane's own authority, and nothing else."""
        return ssl.create_default_context(cafile=str(self.authority))


@contextlib.contextmanager
def data_plane(
    service: ApiService,
    upstream_port: int,
    folder: Path,
    *,
    tls: TlsFiles | None = None,
    tls_port: int = 0,
    api: str = "",
    volumes: str = "",
) -> Iterator[DataPlane]:
    """nginx on free ports; with `tls` on another with TLS, for the service's domain.

    `api`: where nginx looks for the API instead of where it is.
    """
    folder.mkdir(exist_ok=True)
    program = nginx_program()
    with listening(service.route_app) as route, listening(service.app) as own_api:
        port = free_port()  # after those that took theirs
        tls_port = tls_port or (free_port() if tls else 0)
        plan = NginxPlan(
            listen=f"127.0.0.1:{port}",
            route_socket="ROUTE",
            folder=str(folder),
            user="root" if os.geteuid() == 0 else "",
            domain=service.config.domain.partition(":")[0],
            api=api or own_api,
            volumes=volumes,
            tls=tls
            and Tls(
                listen=f"127.0.0.1:{tls_port}",
                certificate=str(tls.certificate),
                key=str(tls.key),
            ),
            version=nginx_version(program),
        )
        config = folder / "nginx.conf"
        config.write_text(render(plan).replace("unix:ROUTE", route))
        process = subprocess.Popen([program, "-p", str(folder), "-c", str(config)])
        try:
            wait_for_port(port, process)
            assert process.poll() is None, "another has nginx's port"
            yield DataPlane(
                port=port,
                upstream_port=upstream_port,
                service=service,
                tls_port=tls_port,
                api_url=f"http://{own_api}",
                authority=tls.authority if tls else None,
            )
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def add_sandbox(
    service: ApiService, sandbox_id: str = SANDBOX_ID, *, traffic_token: str = ""
) -> None:
    """A running sandbox of the fake node with its row in the store."""
    team = service.store.ensure_team("team-one")
    record = SandboxRecord(
        sandbox_id=sandbox_id,
        team_id=team.team_id,
        template_id="base",
        access_token=TOKEN,
        traffic_token=traffic_token,
        metadata={},
        created_at_unix_ms=0,
    )
    service.store.add_sandbox(record, limit=9, live=())
    order = NewSandbox(
        sandbox_id=sandbox_id,
        template_id="base",
        image="docker.io/vmcell/base:latest",
        vcpus=1,
        memory_mib=64,
        timeout_s=60,
    )
    service.node.create(order)


def free_port() -> int:
    """A loopback port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when somebody listens there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def raw(port: int, data: bytes) -> bytes:
    """What comes back for these bytes until the server closes or is silent for two seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(data)
        client.settimeout(2)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := client.recv(65536):
                answer += chunk
        return answer
