"""Domain mode over TLS: local CA, both host names, HTTP/2, WebSocket; real nginx and clients."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_service import api_service
from data_plane import PATIENCE_S, SANDBOX_ID, DataPlane, add_sandbox, data_plane, free_port
from fake_guest import GuestHandler, fake_guest
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from vmcell_api.node_channel import NodeUnreachable
from vmcell_tools.local_ca import TlsFiles, ensure_certificate

NAME = "sbx.localhost"
STREAMS = 100


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    files, _ = ensure_certificate(tmp_path_factory.mktemp("tls"), NAME)
    return files


@pytest.fixture(scope="module")
def plane(tls_files: TlsFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataPlane]:
    folder = tmp_path_factory.mktemp("plane")
    with (
        api_service(folder, domain=f"{NAME}:8443") as service,
        fake_guest() as guest,
        fake_guest() as files,
        data_plane(
            service, guest, folder / "nginx", tls=tls_files, volumes=f"127.0.0.1:{files}"
        ) as running,
    ):
        add_sandbox(service)
        yield running


def _host(plane: DataPlane, port: int | None = None) -> str:
    return f"{port or plane.upstream_port}-{SANDBOX_ID}.{NAME}"


def _get(
    plane: DataPlane, host: str, path: str = "/", *, http2: bool = True, **headers: str
) -> httpx.Response:
    """One request to that host name, which no resolver knows."""
    with httpx.Client(verify=plane.tls_context(), http2=http2, timeout=PATIENCE_S) as client:
        return client.get(
            f"https://127.0.0.1:{plane.tls_port}{path}",
            headers={"Host": f"{host}:8443", **headers},
            extensions={"sni_hostname": host},
        )


def test_the_wildcard_name_leads_to_the_port(plane: DataPlane) -> None:
    for http2 in (True, False):
        answer = _get(plane, _host(plane), "/a%2Fb?c=d", http2=http2)
        assert answer.status_code == 200, answer.text
        assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert answer.json()["path"] == "/a%2Fb?c=d"
        assert answer.json()["headers"]["host"] == f"{_host(plane)}:8443"
    answer = _get(plane, f"{plane.upstream_port}-{SANDBOX_ID}-vmcell.{NAME}")
    assert answer.status_code == 200, "SDK 1.x puts the client id there"
    assert "was not found" in _get(plane, f"80-i{'0' * 19}.{NAME}").text
    assert _get(plane, f"80-short.{NAME}").status_code == 400
    assert _get(plane, f"nothing.{NAME}").status_code == 400
    by_headers = {"E2b-Sandbox-Id": SANDBOX_ID, "E2b-Sandbox-Port": str(plane.upstream_port)}
    assert _get(plane, f"sandbox.{NAME}", **by_headers).status_code == 200


def test_the_api_has_a_name_of_its_own(plane: DataPlane) -> None:
    assert _get(plane, f"api.{NAME}", "/health").json() == {"status": "ok"}
    answer = _get(plane, f"api.{NAME}", "/v2/sandboxes")
    assert (answer.status_code, answer.json()["code"]) == (401, 401)
    key = {"X-API-Key": plane.service.key}
    listed = _get(plane, f"api.{NAME}", "/v2/sandboxes", **key).json()
    assert [entry["sandboxID"] for entry in listed] == [SANDBOX_ID]
    status, body, _ = plane.ask("GET", "/health", Host=f"api.{NAME}")
    assert (status, body) == (200, {"status": "ok"}), "for a TLS proxy of the operator's"


def test_files_of_volumes_are_at_the_apis_name(plane: DataPlane) -> None:
    path = "/volumecontent/v1/file?path=%2Fa%20b"
    answer = _get(plane, f"api.{NAME}", path, Authorization="Bearer e2b_volume")
    assert answer.json()["path"] == path
    assert answer.json()["headers"]["authorization"] == "Bearer e2b_volume"
    assert _get(plane, f"api.{NAME}", "/volumecontents").status_code == 401, "that is the API's"


def test_routing_headers_do_not_turn_the_apis_name_into_a_sandbox(plane: DataPlane) -> None:
    by_headers = {"E2b-Sandbox-Id": SANDBOX_ID, "E2b-Sandbox-Port": str(plane.upstream_port)}
    assert _get(plane, f"api.{NAME}", "/health", **by_headers).json() == {"status": "ok"}


def test_a_stranger_to_the_authority_does_not_connect(plane: DataPlane) -> None:
    context = ssl.create_default_context()
    with (
        socket.create_connection(("127.0.0.1", plane.tls_port), timeout=PATIENCE_S) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname=_host(plane))


def test_a_hundred_streams_on_one_connection(plane: DataPlane) -> None:
    """None of them is finished before all have begun; nothing is buffered."""
    GuestHandler.release.clear()

    async def one(client: httpx.AsyncClient, begun: asyncio.Barrier) -> bytes:
        host = _host(plane)
        request = client.stream(
            "GET",
            f"https://127.0.0.1:{plane.tls_port}/stream",
            headers={"Host": f"{host}:8443"},
            extensions={"sni_hostname": host},
        )
        async with request as answer:
            assert answer.http_version == "HTTP/2"
            parts = answer.aiter_raw()
            first = await anext(parts)
            await begun.wait()
            GuestHandler.release.set()
            return first + b"".join([part async for part in parts])

    async def all_of_them() -> list[bytes]:
        begun = asyncio.Barrier(STREAMS)
        limits = httpx.Limits(max_connections=1)
        context = plane.tls_context()
        async with httpx.AsyncClient(
            verify=context, http2=True, limits=limits, timeout=PATIENCE_S
        ) as client:
            return await asyncio.gather(*(one(client, begun) for _ in range(STREAMS)))

    assert asyncio.run(all_of_them()) == [b"firstsecond"] * STREAMS


def test_a_large_body_over_http2(plane: DataPlane) -> None:
    size = 4 << 20
    with httpx.Client(verify=plane.tls_context(), http2=True, timeout=PATIENCE_S) as client:
        answer = client.post(
            f"https://127.0.0.1:{plane.tls_port}/up",
            headers={"Host": f"{_host(plane)}:8443"},
            extensions={"sni_hostname": _host(plane)},
            content=bytes(size),
        )
    assert (answer.http_version, answer.json()["body_bytes"]) == ("HTTP/2", size)


def test_a_websocket_echoes_through_tls(plane: DataPlane) -> None:
    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, "127.0.0.1", 0) as server:
        port = server.socket.getsockname()[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            plain = socket.create_connection(("127.0.0.1", plane.tls_port), timeout=PATIENCE_S)
            with connect(
                f"wss://{_host(plane, port)}/chat?x=1", sock=plain, ssl=plane.tls_context()
            ) as client:
                for message in ("text", b"\x00bytes", "x" * 200_000):
                    client.send(message)
                    assert client.recv(timeout=PATIENCE_S) == message
                client.ping().wait(PATIENCE_S)
        finally:
            server.shutdown()
            thread.join(10)


def test_the_api_being_down_is_said_in_json(tls_files: TlsFiles, tmp_path: Path) -> None:
    with (
        api_service(tmp_path, domain=NAME) as service,
        fake_guest() as guest,
        data_plane(
            service, guest, tmp_path / "n", tls=tls_files, api=f"127.0.0.1:{free_port()}"
        ) as plane,
    ):
        answer = _get(plane, f"api.{NAME}", "/v2/sandboxes")
        assert (answer.status_code, answer.json()["code"]) == (503, 503)
        assert answer.headers["should-retry"] == "true", "it never arrived"
        assert answer.headers["retry-after"] == "1"


def test_the_router_being_down_is_said_in_json(plane: DataPlane) -> None:
    plane.service.node.fail_next = NodeUnreachable("no noded")
    answer = _get(plane, _host(plane))
    assert (answer.status_code, answer.json()["code"]) == (503, 503)
    assert json.loads(answer.text)["message"].startswith("the sandbox router")
