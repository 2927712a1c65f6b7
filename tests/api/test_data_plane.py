"""The real nginx with our configuration, before the route application and a tiny upstream."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest
from api_service import ApiService
from data_plane import (
    PATIENCE_S,
    SANDBOX_ID,
    TOKEN,
    DataPlane,
    add_sandbox,
    data_plane,
    free_port,
    raw,
)
from fake_guest import GuestHandler, fake_guest

from vmcell_api import signature_search

PRIVATE_ID = "i" + "p9" * 9 + "z"
TRAFFIC_TOKEN = "ab" * 32
CONNECTIONS = 100


@pytest.fixture(scope="module")
def upstream_port() -> Iterator[int]:
    with fake_guest() as port:
        yield port


@pytest.fixture
def plane(service: ApiService, upstream_port: int, tmp_path: Path) -> Iterator[DataPlane]:
    add_sandbox(service)
    with data_plane(service, upstream_port, tmp_path / "nginx") as running:
        yield running


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
    closed = free_port()
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
    GuestHandler.release.clear()
    connection = http.client.HTTPConnection("127.0.0.1", plane.port, timeout=PATIENCE_S)
    named = {name.replace("_", "-"): value for name, value in plane.ids().items()}
    connection.request("GET", "/stream", headers=named)
    answer = connection.getresponse()
    assert answer.read(5) == b"first"
    GuestHandler.release.set()
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
    monkeypatch.setattr(signature_search, "ENVD_PORT", plane.upstream_port)
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


def test_the_signatures_that_are_right_are_not_limited(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature_search, "ENVD_PORT", plane.upstream_port)
    paths = [_signed_path("read", path=f"/tmp/{n % 30}") for n in range(90)]
    assert {plane.ask("GET", path)[0] for path in paths} == {200}


def test_a_browsers_preflight_names_no_sandbox(plane: DataPlane) -> None:
    status, _, headers = plane.ask(
        "OPTIONS", "/process.Process/Start", Origin="http://a",
        Access_Control_Request_Method="POST", Access_Control_Request_Headers="e2b-sandbox-id",
    )  # fmt: skip
    assert status == 204
    assert headers["access-control-allow-origin"] == "*"
    assert headers["access-control-allow-headers"] == "e2b-sandbox-id"


def test_the_router_is_down(plane: DataPlane) -> None:
    from vmcell_api.node_channel import NodeUnreachable

    plane.service.node.fail_next = NodeUnreachable("no noded")
    status, body, _ = plane.ask(**plane.ids())
    assert (status, body["code"]) == (503, 503)


def test_a_private_sandbox_wants_its_token(plane: DataPlane) -> None:
    add_sandbox(plane.service, PRIVATE_ID, traffic_token=TRAFFIC_TOKEN)
    ids = {**plane.ids(), "E2b_Sandbox_Id": PRIVATE_ID}
    for given in ({}, {"E2B_Traffic_Access_Token": "wrong"}, {"E2B_Traffic_Access_Token": ""}):
        status, body, _ = plane.ask(**ids, **given)
        assert (status, body["code"], body["sandboxId"]) == (403, 403, PRIVATE_ID)
        assert body["port"] == plane.upstream_port
        assert "traffic access token" in body["message"]
        assert TRAFFIC_TOKEN not in json.dumps(body)
    for name in ("e2b_traffic_access_token", "E2B_TRAFFIC_ACCESS_TOKEN"):
        status, told, _ = plane.ask(**ids, **{name: TRAFFIC_TOKEN})
        assert status == 200
        assert "e2b-traffic-access-token" not in told["headers"]
    host = f"{plane.upstream_port}-{PRIVATE_ID}.any.domain"
    assert plane.ask(Host=host)[0] == 403
    assert plane.ask(Host=host, E2B_Traffic_Access_Token=TRAFFIC_TOKEN)[0] == 200
    status, body, _ = plane.ask(**{**ids, "E2b_Sandbox_Port": "49983"})
    assert (status, body["port"]) == (502, 49983), "envd has a token of its own"
    status, _, headers = plane.ask(
        "OPTIONS", "/", Origin="http://a", Access_Control_Request_Method="GET",
        Access_Control_Request_Headers="e2b-traffic-access-token", **ids,
    )  # fmt: skip
    assert (status, headers["access-control-allow-origin"]) == (204, "*")


def test_a_sandbox_that_the_store_does_not_know_is_closed(plane: DataPlane) -> None:
    plane.service.store.forget_sandboxes([SANDBOX_ID])
    status, body, _ = plane.ask(**plane.ids())
    assert (status, body["message"]) == (502, "The sandbox was not found")


def test_a_browser_gets_a_page_and_scripts_get_json(plane: DataPlane) -> None:
    unknown = {"E2b_Sandbox_Id": "i" + "0" * 19, "E2b_Sandbox_Port": "80"}
    page = {"Accept": "text/html,*/*;q=0.8", "Sec_Fetch_Mode": "navigate"}
    status, text, headers = plane.ask_raw(**unknown, **page)
    assert (status, headers["content-type"].partition(";")[0]) == (502, "text/html")
    assert b"The sandbox was not found" in text
    for told in ({"Accept": "text/html"}, {"Accept": "*/*", "Sec_Fetch_Mode": "navigate"}):
        assert plane.ask(**unknown, **told)[1]["code"] == 502


def test_a_guest_does_not_steer_nginx(plane: DataPlane) -> None:
    for inner in ("/.vmcell/route", "/@refused", "/own403"):
        status, told, headers = plane.ask("GET", f"/steer{inner}", **plane.ids())
        assert (status, told["path"]) == (200, f"/steer{inner}")
        assert "x-vmcell-upstream" not in headers


def test_internal_places_are_nobodys(plane: DataPlane) -> None:
    forged = {"X_Vmcell_Upstream": "127.0.0.1:1", "X_Vmcell_Refusal": "{}"}
    status, _, headers = plane.ask_raw("GET", "/.vmcell/route", **plane.ids(), **forged)
    assert status == 404
    assert "x-vmcell-upstream" not in headers
    status, told, _ = plane.ask("GET", "/refused", **plane.ids(), **forged)
    assert (status, told["path"]) == (200, "/refused"), "the guest's own path"


def test_what_nginx_asks_cannot_be_told_by_the_client(plane: DataPlane) -> None:
    """Headers of the router's own question, as a client would forge them."""
    closed = free_port()
    forged = {
        "X_Original_Host": f"{closed}-{SANDBOX_ID}.x",
        "X_Original_Uri": "/files?signature=v1_x",
        "X_Original_Method": "OPTIONS",
        "X_Original_Client": "1.2.3.4",
        "X_Forwarded_Host": f"{closed}-{SANDBOX_ID}.x",
        "X_Real_IP": "1.2.3.4",
        "Forwarded": f"host={closed}-{SANDBOX_ID}.x",
    }
    status, told, _ = plane.ask("GET", "/here", **plane.ids(), **forged)
    assert (status, told["path"]) == (200, "/here")
    assert told["headers"]["x-original-host"] == forged["X_Original_Host"], "the user's own"
    status, body, _ = plane.ask("GET", "/here", **forged)
    assert (status, body["code"]) == (400, 400)


def test_many_and_large_headers_reach_the_guest(plane: DataPlane) -> None:
    many = {f"X_Mine_{number}": "v" for number in range(90)}
    status, told, _ = plane.ask("GET", "/" + "p" * 20000, **plane.ids(), **many)
    assert status == 200
    assert sum(name.startswith("x-mine") for name in told["headers"]) == 90
    status, body, _ = plane.ask("GET", "/" + "p" * 20000)
    assert (status, body["code"]) == (400, 400)


CLOSE = "Connection: close"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def _head(port: int, *lines: str, method: str = "POST") -> bytes:
    own = [f"E2b-Sandbox-Id: {SANDBOX_ID}", f"E2b-Sandbox-Port: {port}"]
    return "\r\n".join([f"{method} /outer HTTP/1.1", "Host: x", *own, *lines, "", ""]).encode()


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5, 6",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: identity", "Content-Length: 5"),
        ("Content-Length : 5",),
        ("Host: other",),
    ],
)
def test_a_length_that_can_be_read_two_ways_is_refused(
    plane: DataPlane, lines: tuple[str, ...]
) -> None:
    answer = raw(plane.port, _head(plane.upstream_port, *lines) + b"0\r\n\r\n" + SMUGGLED)
    first = answer.partition(b"\r\n")[0]
    assert first.split()[1] in (b"400", b"411", b"501"), answer
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert b"/smuggled" not in answer


def test_a_body_stays_a_body(plane: DataPlane) -> None:
    """What looks like a request in a body is none, however the body is framed."""
    whole = _head(plane.upstream_port, f"Content-Length: {len(SMUGGLED)}") + SMUGGLED
    chunked = _head(plane.upstream_port, "Transfer-Encoding: chunked")
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    for data in (whole, chunked):
        answer = raw(plane.port, data)
        assert answer.count(b"HTTP/1.1 200") == 1, answer
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (told["path"], told["body_bytes"]) == ("/outer", len(SMUGGLED))


def test_an_absolute_target_names_no_other_address(plane: DataPlane) -> None:
    closed = free_port()
    for target in (f"http://127.0.0.1:{closed}/x", f"http://{closed}-{SANDBOX_ID}.x/x", "//x/y"):
        head = _head(plane.upstream_port, CLOSE, method="GET").replace(b"/outer", target.encode())
        answer = raw(plane.port, head)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert told["headers"]["e2b-sandbox-id"] == SANDBOX_ID
    answer = raw(plane.port, b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % closed)
    assert answer.startswith((b"HTTP/1.1 405", b"HTTP/1.1 400")), answer


def test_a_name_with_an_underscore_is_no_routing_header(plane: DataPlane) -> None:
    """Else it could override the one that nginx checks, on its way through WSGI."""
    lines = ("E2b_Sandbox_Port: 1", "E2b_Sandbox_Id: i0000000000000000000")
    answer = raw(plane.port, _head(plane.upstream_port, CLOSE, *lines, method="GET"))
    assert answer.startswith(b"HTTP/1.1 200"), answer


def test_many_connections_at_once(plane: DataPlane) -> None:
    """All are begun before one is finished; none is reset."""
    GuestHandler.release.clear()
    begun = threading.Barrier(CONNECTIONS, timeout=PATIENCE_S)

    def one(_: int) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", plane.port, timeout=PATIENCE_S)
        named = {name.replace("_", "-"): value for name, value in plane.ids().items()}
        connection.request("GET", "/stream", headers=named)
        answer = connection.getresponse()
        first = answer.read(5)
        begun.wait()
        GuestHandler.release.set()
        whole = first + answer.read()
        connection.close()
        return whole

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        assert list(pool.map(one, range(CONNECTIONS))) == [b"firstsecond"] * CONNECTIONS
