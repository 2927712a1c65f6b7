"""What the command line says of an API that is not there, is none, or refuses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import falcon
import pytest
from api_service import ApiService, api_service, listening
from click.testing import CliRunner

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.api_client import ApiClient, client_of_environment, segment
from vmcell_tools.cli import main
from vmcell_tools.sandbox_client import SandboxClient

ID = "i" + "0" * 19
BAD_URLS = ("http://", "http://[", "http://a:b", "http://a:0", "http://a b", "http://é")
# One command of each group, and those of the groups that have many.
COMMANDS = (
    *(("template", "list"), ("volume", "list"), ("snapshot", "list")),
    *(("snapshot", "create", ID), ("snapshot", "delete", "x"), ("snapshot", "diff", "x", "y")),
    *(("sandbox", "list"), ("sandbox", "create"), ("sandbox", "kill", ID)),
    *(("sandbox", "logs", ID), ("sandbox", "exec", ID, "--", "true"), ("sandbox", "fork", ID)),
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("E2B_API_URL", "E2B_DOMAIN", "E2B_SANDBOX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("E2B_API_KEY", "e2b_" + "0" * 40)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with api_service(tmp_path) as running, listening(running.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        yield running


def _error(words: tuple[str, ...]) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == (125 if "exec" in words else 1), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", COMMANDS)
def test_no_key_no_api_no_scope(
    service: ApiService, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    assert "API key is not valid; make one with: vmcell key create" in _error(words)
    monkeypatch.setenv("E2B_API_KEY", service.new_key("team-one", "team:read"))
    assert "this call needs " in _error(words)
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    assert "start it with `vmcell serve`, or set E2B_API_URL" in _error(words)
    for url in ("127.0.0.1:3000", "here", "ftp://x", *BAD_URLS):
        monkeypatch.setenv("E2B_API_URL", url)
        sentence = f"E2B_API_URL is {url!r}; set it to a URL like http://127.0.0.1:3000"
        assert _error(words) == f"Error: {sentence}"
    monkeypatch.setenv("E2B_API_KEY", "e2b_…")
    assert "E2B_API_KEY holds characters that no key has" in _error(words)
    monkeypatch.delenv("E2B_API_KEY")
    assert "E2B_API_KEY is not set; make a key with `vmcell key create" in _error(words)


def test_where_the_api_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_of_environment().url == "http://127.0.0.1:3000"
    monkeypatch.setenv("E2B_DOMAIN", "sbx.example.com:8443")
    assert client_of_environment().url == "https://api.sbx.example.com:8443"
    monkeypatch.setenv("E2B_API_URL", "http://[::1]:3000/")
    assert client_of_environment().url == "http://[::1]:3000"


@pytest.mark.parametrize("domain", ["a b", "a:b", "https://example.com", "example.com/", "é.com"])
def test_a_domain_that_is_none(monkeypatch: pytest.MonkeyPatch, domain: str) -> None:
    monkeypatch.setenv("E2B_DOMAIN", domain)
    assert _error(("sandbox", "list")) == (
        f"Error: E2B_DOMAIN is {domain!r}; set it to a name like sbx.example.com"
    )


NO_ROWS = (
    *(("<html>", "with no JSON"), ("", "with no list"), ('{"a": 1}', "with no list")),
    *(("[1, 2]", "with no object"), ('[{"a": 1}]', "without ")),
)
UNREASONED = "gives no reason; see that E2B_API_URL is vmcell's API, of this version"


@pytest.mark.parametrize(
    ("media", "words", "sentence"),
    [
        ("<html>", ("sandbox", "list"), "GET /v2/sandboxes with no JSON"),
        ("{}", ("sandbox", "list"), "GET /v2/sandboxes with no list"),
        ("[1]", ("sandbox", "list"), "GET /v2/sandboxes with no object"),
        ('[{"sandboxID": "x"}]', ("sandbox", "list"), "GET /v2/sandboxes without templateID, st"),
        ("", ("sandbox", "show", "x"), "GET /sandboxes/ID with no object"),
        ("[]", ("sandbox", "create"), "POST /v2/sandboxes with no object"),
        ("{}", ("sandbox", "fork", "x"), "POST …/fork with no list"),
        ("{}", ("sandbox", "memory", "x"), "GET …/memory without guestMemoryBytes"),
        ("{}", ("snapshot", "list"), "GET /snapshots with no list"),
        *((body, ("volume", "list"), f"GET /volumes {fault}") for body, fault in NO_ROWS),
        *((body, ("template", "list"), f"GET /templates {fault}") for body, fault in NO_ROWS),
        ("<html>", ("template", "watch", "x"), "GET /templates/x with no JSON"),
        ("[1, 2]", ("template", "watch", "x"), "GET /templates/x with no object"),
        ('{"a": 1}', ("template", "watch", "x"), "GET /templates/x without templateID, builds"),
    ],
)
def test_another_kind_of_server(
    monkeypatch: pytest.MonkeyPatch, media: str, words: tuple[str, ...], sentence: str
) -> None:
    with _answering(media) as url:
        monkeypatch.setenv("E2B_API_URL", f"{url}/below")
        error = _error(words)
    assert error.startswith(f"Error: {url}/below answers {sentence}")
    assert error.endswith("; see that E2B_API_URL is vmcell's API, of this version")


@pytest.mark.parametrize("words", COMMANDS)
def test_a_server_without_these_routes(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    with _answering("<html>", 404) as url:
        monkeypatch.setenv("E2B_API_URL", url)
        assert _error(words) == f"Error: {url} answers 404 and {UNREASONED}"


@contextmanager
def _answering(text: str, status: int = 200) -> Iterator[str]:
    def answer(req: falcon.Request, resp: falcon.Response) -> None:
        resp.status, resp.text = status, text

    app: falcon.App = falcon.App()
    app.add_sink(answer)
    with listening(app) as address:
        yield f"http://{address}"


@pytest.mark.parametrize(
    ("status", "text", "kind", "code", "words"),
    [
        (404, '{"message": "gone"}', CallerError, "not_found", "gone"),
        (409, '{"message": "no room"}', CallerError, "aborted", "no room"),
        (418, "teapot", CallerError, "invalid_argument", f"URL answers 418 and {UNREASONED}"),
        (404, "[]", CallerError, "invalid_argument", f"URL answers 404 and {UNREASONED}"),
        (502, "<html>", HostError, "unavailable", f"URL answers 502 and {UNREASONED}"),
        (500, '{"message": "broken"}', HostError, "unavailable", "broken"),
    ],
)
def test_refusals(status: int, text: str, kind: type[Exception], code: str, words: str) -> None:
    with _answering(text, status) as url, pytest.raises(kind) as caught:
        ApiClient(url, "k").ask("GET", "/x")
    assert str(caught.value).replace(url, "URL") == words
    assert caught.value.code == code


def test_a_slow_api_is_not_called_absent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = ApiClient(f"http://127.0.0.1:{server.getsockname()[1]}", "k")
        with pytest.raises(HostError, match="has not answered POST /x within 1 s; it may still"):
            client.ask("POST", "/x", {}, within_s=1)


def test_an_answer_that_breaks_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def cut() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[")

        thread = threading.Thread(target=cut)
        thread.start()
        client = ApiClient(f"http://127.0.0.1:{server.getsockname()[1]}", "k")
        with pytest.raises(HostError, match="does not answer"):
            client.ask("GET", "/x")
        thread.join(10)


def test_segments() -> None:
    assert segment("a/b:c d%") == "a%2Fb%3Ac%20d%25"
    for text in ("", ".", "..", "\udc80"):
        with pytest.raises(CallerError, match="neither an id nor a name"):
            segment(text)


def test_an_id_that_another_team_has(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2B_API_KEY", service.key)
    made = SandboxClient(client_of_environment()).create({"templateID": "base"})
    monkeypatch.setenv("E2B_API_KEY", service.new_key("team-two"))
    assert "was not found" in _error(("sandbox", "kill", made["sandboxID"]))
    assert len(service.node.running) == 1
