"""What the wire looks like: status, text and lines, kept alive, cut off, and after a death."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from interpreter_harness import Interpreter


@pytest.fixture
def http(interpreter: Interpreter) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=interpreter.url, timeout=60) as client:
        yield client


def test_lines_of_a_run(http: httpx.Client) -> None:
    body = {"code": "print('a'); 1", "context_id": None, "language": None, "env_vars": None}
    answer = http.post("/execute", json=body)
    assert answer.status_code == 200
    assert "content-length" not in answer.headers
    lines = [json.loads(row) for row in answer.text.splitlines()]
    kinds = [line["type"] for line in lines]
    assert kinds == ["number_of_executions", "stdout", "result", "end_of_execution"]
    assert lines[1]["text"] == "a\n"
    assert "T" in lines[1]["timestamp"]
    assert (lines[2]["text"], lines[2]["is_main_result"]) == ("1", True)


def test_health_and_contexts(http: httpx.Client) -> None:
    assert http.get("/health").json() == "OK"
    # an empty body is the default context's description
    made = http.post("/contexts").json()
    assert made["language"] == "python"
    for method, path in (("POST", "/restart"), ("DELETE", "")):
        answer = http.request(method, f"/contexts/{made['id']}{path}")
        assert (answer.status_code, answer.json()) == (200, None)
        gone = http.request(method, f"/contexts/nosuch{path}")
        assert (gone.status_code, gone.text) == (404, "Context nosuch not found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/execute", b"{", 400, "not JSON"),
        ("POST", "/execute", b'{"code": "1", "context_id": "x"}', 404, "Context x not found"),
        ("POST", "/execute", b'{"code": "1", "context_id": "x", "language": "r"}', 400, "only one"),
        ("POST", "/execute", b'{"code": "1", "language": "r"}', 500, "R is not installed"),
        ("POST", "/contexts", b'{"language": 1}', 400, "takes a string"),
        ("POST", "/contexts", b'{"cwd": "/etc/passwd"}', 500, "does not exist"),
        ("GET", "/execute", b"", 405, "Not Allowed"),
        ("GET", "/nosuch", b"", 404, "no endpoint"),
        ("PUT", "/contexts", b"{}", 405, "Not Allowed"),
    ],
)
def test_errors_are_a_line_of_text(
    http: httpx.Client, method: str, path: str, body: bytes, status: int, words: str
) -> None:
    before = http.get("/contexts").json()
    answer = http.request(method, path, content=body)
    assert answer.status_code == status
    assert words in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    assert http.get("/contexts").json() == before


def test_the_status_line_names_what_is_missing(http: httpx.Client) -> None:
    answer = http.post("/contexts", json={"language": "java"})
    assert (answer.status_code, answer.reason_phrase) == (500, "Language Not Installed")


def test_browsers_may_call(http: httpx.Client) -> None:
    answer = http.options("/execute", headers={"Origin": "http://x", "X-Y": "z"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, "*")


def test_silence_is_filled(http: httpx.Client) -> None:
    started = time.monotonic()
    with http.stream("POST", "/execute", json={"code": "import time; time.sleep(6)"}) as answer:
        kinds = [json.loads(row)["type"] for row in answer.iter_lines()]
    assert kinds == ["number_of_executions", "keepalive", "end_of_execution"]
    assert time.monotonic() - started < 30


def test_a_body_in_chunks(http: httpx.Client) -> None:
    answer = http.post("/execute", content=iter([b'{"code": ', b'"6 * 7"}']))
    assert json.loads(answer.text.splitlines()[1])["text"] == "42"


def test_a_client_that_leaves_while_it_waits_runs_nothing(http: httpx.Client) -> None:
    """Cut off behind another run of the same context, which goes on."""
    context = http.post("/contexts").json()["id"]
    begun = threading.Event()
    texts: list[str] = []

    def run() -> None:
        code = "import time; print('on', flush=True); time.sleep(2); mark = 'mine'"
        body = {"code": code, "context_id": context}
        with http.stream("POST", "/execute", json=body) as answer:
            for row in answer.iter_lines():
                texts.append(row)
                if "on" in json.loads(row).get("text", ""):
                    begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(30)
    body = json.dumps({"code": "mark = 'other'", "context_id": context}).encode()
    port = int(str(http.base_url).rpartition(":")[2].strip("/"))
    with socket.create_connection(("127.0.0.1", port)) as waiting:
        head = f"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        waiting.sendall(head.encode() + body)
        assert waiting.recv(12) == b"HTTP/1.1 200"
    thread.join(30)
    assert json.loads(texts[-1])["type"] == "end_of_execution"
    assert not [row for row in texts if '"error"' in row]
    answer = http.post("/execute", json={"code": "mark", "context_id": context})
    assert json.loads(answer.text.splitlines()[1])["text"] == "mine"
    http.delete(f"/contexts/{context}")


def test_a_removed_context_ends_its_run(http: httpx.Client) -> None:
    context = http.post("/contexts", json={"language": "javascript"}).json()["id"]
    body = {"code": "console.log('on'); await new Promise(() => {})", "context_id": context}
    with http.stream("POST", "/execute", json=body) as answer:
        lines = answer.iter_lines()
        while json.loads(next(lines))["type"] != "stdout":
            pass
        assert http.delete(f"/contexts/{context}").status_code == 200
        rest = [json.loads(row) for row in lines]
    assert [line["type"] for line in rest] == ["error", "end_of_execution"]
    assert rest[0]["value"] == "Context was removed"


def test_kernels_end_with_a_server_that_is_killed(lone: Interpreter) -> None:
    for language in ("python", "js", "bash"):
        answer = httpx.post(
            f"{lone.url}/execute", json={"code": "true", "language": language}, timeout=60
        )
        assert answer.status_code == 200
    kernels = lone.kernels()
    assert len(kernels) == 3
    lone.process.kill()
    lone.process.wait(10)
    until = time.monotonic() + 20
    while any(_runs(pid) for pid in kernels):
        assert time.monotonic() < until, f"of {kernels} some live on"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGCONT)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
