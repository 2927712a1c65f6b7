"""The matrix: tables of results, the front for clients without a URL, and one real column."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from envd_node import envd_service

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.cli_matrix import images_for
from vmcell_tools.matrix import running, table
from vmcell_tools.matrix.clients import CLIENTS, chosen
from vmcell_tools.matrix.domain_front import DOMAIN, domain_front
from vmcell_tools.matrix.installation import DRIVERS
from vmcell_tools.matrix.keeping import KeptResults
from vmcell_tools.matrix.running import Column, Result
from vmcell_tools.matrix.services import Service
from vmcell_tools.progress import Progress

PATIENCE_S = 120
# For what the stand-in never has, the metrics of a sandbox.
CALL_PATIENCE_S = 15
# What the service in tests/support/envd_node.py does not have: routes and options of the control
# plane that need more than an envd. A line goes when its route comes.
NOT_YET = {
    "get_metrics",
    "network rules",
    "network rules: domain names",
    "update_network",
    "pause, connect",
    "pause: files alone",
    "lifecycle: auto-pause",
    "lifecycle: auto-resume",
    "snapshots",
    "fork",
    "volumes",
    "Template.build",
    "secrets",
    "mcp",
}


def column(*results: tuple[str, str, str], number: int = 0, skipped: str = "") -> Column:
    found = [Result(call=call, outcome=outcome, detail=said) for call, outcome, said in results]
    return Column(client=CLIENTS[number], results=found, skipped=skipped)


COLUMNS = [
    column(
        ("a", "ok", ""),
        ("b", "refused", "no <b> | ia1b2c3d4e5f6g7h8i9j here\nmore"),
        ("d", "absent", ""),
    ),
    column(("a", "failed", "oops"), ("c", "ok", ""), ("d", "ok", ""), number=1),
    column(number=2, skipped="node is not installed"),
]


def test_rows_stand_where_each_driver_has_them() -> None:
    assert table.calls_of(COLUMNS) == ["a", "c", "b", "d"]


def test_a_page_gets_tables_and_sentences_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = (mark.format("matrix") for mark in table.MARKS)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        table.write_page(page, COLUMNS, "today, here")
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\nLast run: today, here.")
    assert text.endswith(f"{end}\nafter\n")
    assert "| a | ok | FAILED [1] | not run |" in text
    assert "| b | refused [2] | – | not run |" in text
    assert "2. no &lt;b> \\| &lt;id> here\n" in text
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(HostError, match="has no line"):
        table.write_page(page, COLUMNS, "today")
    page.write_text(begin)
    with pytest.raises(HostError, match="and no"):
        table.write_page(page, COLUMNS, "today")


def test_the_summary_counts() -> None:
    lines = table.summary(COLUMNS, "today").splitlines()
    assert lines[4].endswith("| 1 | 1 | 0 | 1 |")
    assert lines[6].endswith("| not run | not run | not run | not run |")


def test_clients_are_chosen_by_words() -> None:
    assert chosen(()) == CLIENTS
    assert {client.package for client in chosen(("cube",))} == {"cubesandbox"}
    with pytest.raises(CallerError, match="cubesandbox"):
        chosen(("no such client",))
    for client in CLIENTS:
        assert (DRIVERS / client.driver).is_file(), client


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.server.server_port} {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("words", "images"),
    [
        (("e2b 2.", "@e2b/cli"), ("base",)),
        (("cubesandbox",), ("base", "code-interpreter-v1")),
        (("desktop",), ("base", "desktop")),
        ((), ("base", "code-interpreter-v1", "desktop")),
    ],
)
def test_the_images_are_those_that_the_chosen_start_from(
    words: tuple[str, ...], images: tuple[str, ...]
) -> None:
    assert images_for(chosen(words)) == images


def test_the_front_hands_each_name_to_its_server(tmp_path: Path) -> None:
    servers = [HTTPServer(("127.0.0.1", 0), _Echo) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    addresses = [("127.0.0.1", server.server_port) for server in servers]
    try:
        with domain_front(tmp_path, *addresses) as front:
            port = int(front.domain.partition(":")[2])
            context = ssl.create_default_context(cafile=str(front.authority))
            for name, (_, upstream) in zip(("api", "49983-iabc"), addresses, strict=True):
                host = f"{name}.{DOMAIN}"
                with (
                    socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw,
                    context.wrap_socket(raw, server_hostname=host) as client,
                ):
                    client.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                    answer = client.recv(65536)
                    while not answer.endswith(host.encode()):
                        answer += client.recv(65536)
                assert f"{upstream} {host}".encode() in answer
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class LosingServices:
    """Services whose machine is lost as often as `losses` has reasons."""

    def __init__(self, *losses: str) -> None:
        self.losses = list(losses)
        self.made = 0

    def get(self) -> Service:
        self.made += 1
        return Service(api_url="http://127.0.0.1:1", sandbox_url="http://127.0.0.1:2", key="e2b_0")

    def lost(self) -> str:
        return self.losses.pop(0) if self.losses else ""


FAILS_AT_FIRST = """\
import json, pathlib, sys
runs = pathlib.Path(sys.argv[1])
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
outcome = sys.argv[2].split(",")[len(runs.read_text()) - 1]
if outcome != "silent":
    print(json.dumps({"call": "a", "outcome": outcome, "detail": "", "ms": 1}))
"""


@pytest.mark.parametrize(
    ("outcomes", "losses", "wanted", "again"),
    [
        ("failed,ok", ["the kernel panicked"], "ok", "the kernel panicked"),
        ("silent,ok", ["the kernel panicked"], "ok", "the kernel panicked"),
        ("failed,failed", ["one", "two"], "failed", "one"),
        ("failed,ok", [], "failed", ""),
        ("ok,failed", ["a guest was lost, and no call noticed"], "ok", ""),
    ],
)
def test_a_client_whose_machine_was_lost_is_run_once_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: str,
    losses: list[str],
    wanted: str,
    again: str,
) -> None:
    driver = [sys.executable, "-c", FAILS_AT_FIRST, str(tmp_path / "runs"), outcomes]
    monkeypatch.setattr(running, "install", lambda client, cache, progress: tmp_path)
    monkeypatch.setattr(running, "command", lambda client, environment: driver)
    services = LosingServices(*losses)
    progress = Progress("test", quiet=True)
    found = running.run_client(CLIENTS[0], services, BuildCache(tmp_path), progress)
    assert [result.outcome for result in found.results] == [wanted]
    assert found.again == again
    assert services.made == 1 + bool(again)
    assert found.day


def test_a_driver_without_a_call_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "install", lambda client, cache, progress: tmp_path)
    monkeypatch.setattr(running, "command", lambda client, environment: ["sh", "-c", "echo no >&2"])
    progress = Progress("test", quiet=True)
    with pytest.raises(HostError, match="made no call:\nno"):
        running.run_client(CLIENTS[0], LosingServices(), BuildCache(tmp_path), progress)


def test_kept_results_are_found_again_for_the_same_client_only(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    kept = KeptResults(path)
    first = column(("a", "failed", "oops"))
    first.again, first.day = "lost", "2026-01-31"
    second = column(("b", "ok", ""), number=14)
    for found in (first, second):
        kept.add(found)
    read = KeptResults(path)
    assert read.find(CLIENTS[0]) == first
    assert read.find(CLIENTS[14]) == second
    assert read.find(CLIENTS[1]) is None
    assert read.find(replace(CLIENTS[0], version="0")) is None
    for wrong in ("no JSON", "{}x", '[{"client": 1}]', "[1]"):
        path.write_text(wrong)
        with pytest.raises(CallerError, match="holds no results"):
            KeptResults(path)
    with pytest.raises(CallerError, match="no is no directory; make it"):
        KeptResults(tmp_path / "no" / "folder")
    lost = KeptResults(tmp_path / "taken")
    (tmp_path / "taken").mkdir()
    with pytest.raises(HostError, match="cannot write"):
        lost.add(first)
    assert KeptResults(None).find(CLIENTS[0]) is None


def test_a_page_tells_of_repetitions_and_days() -> None:
    found = [column(("a", "ok", "")), column(("a", "ok", ""), number=1)]
    found[0].day = found[1].day = "2026-01-31"
    assert table.days(found) == "2026-01-31"
    found[1].day, found[1].again = "2026-02-01", "it panicked"
    assert table.days(found) == "2026-01-31 to 2026-02-01"
    for text in (table.markdown(found, "here"), table.summary(found, "here")):
        assert f"Run twice: {CLIENTS[1].column}: it panicked." in text


@pytest.mark.root
@pytest.mark.deep  # the vm lane has the newest SDK against microVMs
@pytest.mark.timeout(300)
def test_the_newest_sdk_on_real_envds(tmp_path: Path) -> None:
    """Every call of the driver but those above succeeds."""
    with envd_service(tmp_path) as service:
        environment = {
            **os.environ,
            "PYTHONPATH": str(DRIVERS),
            "E2B_API_URL": service.api_url,
            "E2B_SANDBOX_URL": service.sandbox_url,
            "E2B_API_KEY": service.key,
            "VMCELL_MATRIX_PATIENCE_S": str(CALL_PATIENCE_S),
        }
        done = subprocess.run(
            [sys.executable, str(DRIVERS / "python_e2b.py")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * 2,
            check=True,
        )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["call"] for r in results} > NOT_YET
    wrong = [
        r for r in results if r["outcome"] not in ("ok", "absent") and r["call"] not in NOT_YET
    ]
    assert not wrong, wrong
