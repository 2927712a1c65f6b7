"""Start and ready commands against a real envd, and against a guest that answers nonsense."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from envd_harness import Envd, running_envd, wait_until

from vmcell_api.node import start_command
from vmcell_api.node.oci_image import parse_config
from vmcell_api.node.start_command import StartCommand
from vmcell_protos.errors import CallerError, HostError, VmcellError

ADDRESS = "127.0.0.1"


@pytest.fixture
def envd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Envd]:
    with running_envd(tmp_path) as server:
        monkeypatch.setattr(start_command, "ENVD_PORT", server.port)
        yield server


def run(start: str = "", ready: str = "", *, within_s: float = 30, died: bool = False) -> None:
    ended = threading.Event()
    if died:
        ended.set()
    command = StartCommand(start=start, ready=ready)
    start_command.run(ADDRESS, command, access_token="", timeout_s=within_s, died=ended)


@pytest.mark.root
def test_it_goes_on_and_ready_is_waited_for(envd: Envd) -> None:
    start = "cd /tmp; sleep 0.5; echo $BASH_VERSION > ready; id -u >> ready; exec sleep 321"
    run(start, "exec grep -q . /tmp/ready")
    version, uid = envd.path("/tmp/ready").read_text().split()
    assert version.startswith("5")
    assert uid == "0"
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in envd.children()]
    assert b"sleep\x00321\x00" in commands


@pytest.mark.root
def test_without_a_ready_command_the_start_is_enough(envd: Envd) -> None:
    run("touch /tmp/started; exec sleep 321")
    wait_until(lambda: envd.path("/tmp/started").exists(), "the start command")


@pytest.mark.root
def test_a_start_command_may_leave_a_service_behind(envd: Envd) -> None:
    run("(sleep 0.3; touch /tmp/up) >/dev/null 2>&1 & exit 0", "test -e /tmp/up")


@pytest.mark.root
def test_a_start_command_that_fails_is_told_with_its_output(envd: Envd) -> None:
    started = time.monotonic()
    with pytest.raises(CallerError, match=r"start command ended with status 3: no such thing"):
        run("echo no such thing >&2; exit 3", "false")
    with pytest.raises(
        CallerError, match=r"start command ended with signal: killed: it printed no"
    ):
        run("kill -9 $$", "false")
    assert time.monotonic() - started < 20


@pytest.mark.root
def test_a_ready_command_that_never_succeeds_is_the_templates_fault(envd: Envd) -> None:
    with pytest.raises(CallerError, match=r"1 s .* ready command 'test -e /never'"):
        run("exec sleep 321", "test -e /never", within_s=1)


@pytest.mark.root
def test_a_machine_that_ends_is_not_waited_for(envd: Envd) -> None:
    with pytest.raises(HostError, match="machine ended"):
        run("exec sleep 321", "false", died=True)


def test_nothing_asked_nothing_done() -> None:
    run()  # no envd is there: a connection would fail


@contextmanager
def answering(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A guest that reads a request, says `reply` and hangs up, for as long as this lasts."""
    with socket.create_server((ADDRESS, 0)) as listener:
        monkeypatch.setattr(start_command, "ENVD_PORT", listener.getsockname()[1])

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def _streamed(*frames: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n\r\n"
    return head + b"".join(b"\0" + len(frame).to_bytes(4, "big") + frame for frame in frames)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"nonsense",
        b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\noops",
        _streamed(b"{"),
        _streamed(b"[]"),
        _streamed(b'{"event": 3}'),
        _streamed(b'{"event": {"data": {"stdout": "*"}}}'),
        _streamed(b'{"event": {"end": []}}'),
        _streamed(b'{"event": {"start": {"pid": 1}}}')[:-3],
        _streamed() + b"\0\xff\xff\xff\xff",
        _streamed() + b'\x02\0\0\0\x21{"error":{"message":"unheard of"}}'[:38],
    ],
)
def test_a_guest_that_answers_nonsense(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(reply, monkeypatch), pytest.raises(VmcellError, match="command ended with"):
        run("true", "true", within_s=10)


def _config(labels: object) -> bytes:
    digest = "sha256:" + "0" * 64
    return json.dumps({"rootfs": {"diff_ids": [digest]}, "config": {"Labels": labels}}).encode()


def test_labels_of_an_image() -> None:
    labels = {"io.vmcell.start": "serve &", "io.vmcell.ready": "true", "other": 3}
    parsed = parse_config(_config(labels), "x")
    assert (parsed.start_command, parsed.ready_command) == ("serve &", "true")
    assert parse_config(_config(None), "x").start_command == ""
    for wrong in (["a"], {"io.vmcell.start": 1}, {"io.vmcell.ready": "a\0b"}):
        with pytest.raises(CallerError, match="cannot be read"):
            parse_config(_config(wrong), "x")
