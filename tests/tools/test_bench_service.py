"""`vmcell bench create` and `rollback` against a server that answers as the API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from api_service import api_service, listening

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.bench.containers import Target
from vmcell_tools.bench.service import bench_create, bench_rollback
from vmcell_tools.bench.service_client import ServiceClient, service_client
from vmcell_tools.progress import Progress

QUIET = Progress("bench", quiet=True)
NOWHERE = Target(address="/nowhere/containerd.sock")


class Service:
    """What is there, and at which call (counted from 1) of which kind it refuses."""

    def __init__(self) -> None:
        self.sandboxes: set[str] = set()
        self.snapshots: dict[str, str] = {}
        self.calls: list[str] = []
        self.refused: tuple[str, int] | None = None

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, object]:
        words = path.strip("/").split("/")
        kind = f"{method} {words[-1] if method == 'POST' else words[-2]}"
        self.calls.append(kind)
        if self.refused == (kind, self.calls.count(kind)):
            return 409, {"code": 409, "message": "no room: 4 of 4"}
        match kind:
            case "POST sandboxes":
                assert (words, body["templateID"]) == (["v2", "sandboxes"], "base")
                made = f"i{len(self.calls)}"
                self.sandboxes.add(made)
                return 201, {"sandboxID": made}
            case "POST snapshots":
                assert words[1] in self.sandboxes
                self.snapshots["snap-1"] = words[1]
                return 201, {"snapshotID": "snap-1", "names": []}
            case "POST rollback":
                assert words[:2] == ["vmcell", "sandboxes"]
                assert self.snapshots[body["snapshotID"]] == words[2]
                return 200, {"sandboxID": words[2], "undo": {}}
            case "DELETE sandboxes":
                self.sandboxes.remove(words[1])
                return 204, None
            case "DELETE templates":
                del self.snapshots[words[1]]
                return 204, None
        raise AssertionError(kind)


@pytest.fixture
def service() -> Iterator[tuple[Service, str]]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            assert self.headers["X-API-KEY"] == "e2b_key"
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            status, tree = state.answer(self.command, self.path, body)
            data = b"" if tree is None else json.dumps(tree).encode()
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_create(service: tuple[Service, str]) -> None:
    state, url = service
    state.refused = ("POST sandboxes", 3)
    client = ServiceClient(url, "e2b_key")
    report = bench_create(client, "base", NOWHERE, count=4, save_s=0, progress=QUIET)
    client.close()
    create, kill, run = report.series
    assert (len(create.values), len(kill.values), run.values) == (3, 3, [])
    (failure,) = create.failures
    assert failure.endswith("POST /v2/sandboxes: 409, no room: 4 of 4")
    assert state.sandboxes == set()
    saving, peer = report.notes
    assert saving == "the template had 0 s to be saved after its first sandbox"
    assert peer.startswith("left out: runc: looking up image docker.io/vmcell/small:latest: ")
    assert report.ratios[0].value is None


def test_rollback(service: tuple[Service, str]) -> None:
    state, url = service
    state.refused = ("POST rollback", 2)
    client = ServiceClient(url, "e2b_key")
    report = bench_rollback(client, "base", 4, QUIET)
    client.close()
    snapshot, rollback = report.series
    assert (len(snapshot.values), len(rollback.values), len(rollback.failures)) == (1, 3, 1)
    assert (state.sandboxes, state.snapshots) == (set(), {})


def test_nothing_is_left_when_the_snapshot_is_refused(service: tuple[Service, str]) -> None:
    state, url = service
    state.refused = ("POST snapshots", 1)
    client = ServiceClient(url, "e2b_key")
    with pytest.raises(CallerError, match="no room"):
        bench_rollback(client, "base", 4, QUIET)
    client.close()
    assert state.sandboxes == set()


def test_a_template_that_cannot_be_made_is_no_benchmark(service: tuple[Service, str]) -> None:
    state, url = service
    state.refused = ("POST sandboxes", 1)
    client = ServiceClient(url, "e2b_key")
    with pytest.raises(CallerError, match="no room"):
        bench_create(client, "base", NOWHERE, count=4, save_s=0, progress=QUIET)
    client.close()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VMCELL_API_URL", "VMCELL_API_KEY", "E2B_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(CallerError, match="VMCELL_API_URL is not set"):
        service_client(None, "key")
    with pytest.raises(CallerError, match="E2B_API_KEY is not set"):
        service_client("http://127.0.0.1:1", None)
    with pytest.raises(CallerError, match="'ftp://x' is no http or https URL"):
        service_client("ftp://x", "key")
    monkeypatch.setenv("VMCELL_API_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("E2B_API_KEY", "key")
    with pytest.raises(HostError, match=r"does not answer POST /v2/sandboxes at http://127"):
        service_client(None, None).create("base")


def test_the_real_api_takes_these_calls(tmp_path: Path) -> None:
    """In front of a node that only pretends."""
    with api_service(tmp_path) as real, listening(real.app) as address:
        client = ServiceClient(f"http://{address}", real.key)
        created = bench_create(client, "base", NOWHERE, count=3, save_s=0, progress=QUIET)
        rolled = bench_rollback(client, "base", 3, QUIET)
        client.close()
        assert real.node.running == {}
    for row in (*created.series[:2], *rolled.series):
        assert not row.failures, row
        assert len(row.values) == (1 if row.what == "snapshot" else 3)
