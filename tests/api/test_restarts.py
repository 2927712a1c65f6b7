"""Parts of the service are killed while 20 streams go through nginx: none of them notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sdk_commands
from envd_harness import running_envd
from fake_guest import GuestHandler, fake_guest
from stand_in_images import GOOD
from whole_service import (
    API_PORT,
    DATA_PORT,
    PATIENCE_S,
    WholeService,
    ask,
    children_of,
    whole_service,
)

pytestmark = pytest.mark.root

STREAMS = 20
GUEST_PORT = 9000
ADDRESSES = ("10.88.0.3", "10.88.0.5")


@pytest.fixture(scope="module")
def service() -> Iterator[WholeService]:
    with whole_service(slot_count=2, workers=2) as running:
        yield running


class Streams:
    """Twenty answers that do not end, each of them read line by line."""

    def __init__(self, ids: dict[str, str]) -> None:
        self._connections = []
        self._answers = []
        for number in range(STREAMS):
            connection = http.client.HTTPConnection("127.0.0.1", DATA_PORT, timeout=PATIENCE_S)
            connection.request("GET", f"/ticks/{number}", headers=ids)
            answer = connection.getresponse()
            assert answer.status == 200
            answer.readline()
            self._connections.append(connection)
            self._answers.append(answer)

    def go_on(self) -> None:
        """One more line comes out of each of them."""
        expected = b"%d\n" % GuestHandler.ticker.tick()
        assert [answer.readline() for answer in self._answers] == [expected] * STREAMS

    def end(self) -> None:
        """Returns when all have been closed by the other side."""
        for answer in self._answers:
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                assert answer.read() == b""

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


@contextlib.contextmanager
def _guests() -> Iterator[None]:
    """A server at the port of every sandbox there may be."""
    with contextlib.ExitStack() as stack:
        for address in ADDRESSES:
            stack.enter_context(fake_guest(address, GUEST_PORT))
        yield


def _until(what: Callable[[], bool], why: str, timeout_s: float = PATIENCE_S) -> float:
    begun = time.monotonic()
    while not what():
        assert time.monotonic() < begun + timeout_s, why
        time.sleep(0.02)
    return time.monotonic() - begun


def _kill_all_of(service: WholeService, part: str) -> None:
    """SIGKILL for the part and all its processes at once."""
    master = service.pid_of(part)
    for pid in (master, *children_of(master)):
        os.kill(pid, signal.SIGKILL)
    _until(lambda: service.pid_of(part) != master, f"{part} was not started again")


def _kill_master_of(service: WholeService, part: str) -> None:
    master = service.pid_of(part)
    os.kill(master, signal.SIGKILL)
    _until(lambda: service.pid_of(part) != master, f"{part} was not started again")


def _create(key: str, timeout_s: int = 600) -> str:
    status, made = ask(
        API_PORT, "POST", "/v2/sandboxes", {"templateID": GOOD, "timeout": timeout_s}, X_API_Key=key
    )
    assert status == 201, made
    return str(made["sandboxID"])


def _end_soon(key: str, sandbox_id: str) -> None:
    path = f"/sandboxes/{sandbox_id}/timeout"
    assert ask(API_PORT, "POST", path, {"timeout": 1}, X_API_Key=key)[0] == 204


def _listed(key: str) -> set[str] | None:
    """The ids that the API lists; None while it does not answer."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        status, found = ask(API_PORT, "GET", "/v2/sandboxes", X_API_Key=key)
        if status == 200:
            return {entry["sandboxID"] for entry in found}
    return None


def _data_status(ids: dict[str, str]) -> int:
    named = {name.replace("-", "_"): value for name, value in ids.items()}
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(DATA_PORT, "GET", "/told", **named)[0]
    return 0


def test_twenty_streams_outlive_the_parts_of_the_service(service: WholeService) -> None:
    key = service.new_key()
    kept, brief = _create(key), _create(key)
    ids = {"E2b-Sandbox-Id": kept, "E2b-Sandbox-Port": str(GUEST_PORT)}
    everything = {kept, brief}
    with _guests():
        streams = Streams(ids)
        streams.go_on()

        _kill_all_of(service, "the API")
        streams.go_on()
        _until(lambda: _listed(key) == everything, "the API does not list all")

        _kill_master_of(service, "the API")
        streams.go_on()
        _until(lambda: _listed(key) == everything, "the API does not list all")

        _kill_all_of(service, "the router")
        streams.go_on()
        _until(lambda: _data_status(ids) == 200, "no new request passes the router")

        # Its end comes while nobody keeps time.
        _end_soon(key, brief)
        _kill_all_of(service, "noded")
        streams.go_on()
        _until(lambda: _listed(key) == {kept}, "the timeout did not fire")
        _until(lambda: _data_status(ids) == 200, "no new request passes")
        streams.go_on()

        _kill_master_of(service, "nginx")
        streams.go_on()
        _until(lambda: _data_status(ids) == 200, "no new request passes nginx")
        streams.go_on()

        later = Streams(ids)
        _end_soon(key, kept)
        later.end()
        streams.end()
        assert _data_status(ids) == 502
        streams.close()
        later.close()
    assert _listed(key) == set()
    log = service.log.read_text()
    assert log.count("starting it again") == 5, log
    assert "Traceback" not in log


def test_a_killed_sandboxs_streams_end_at_once(service: WholeService) -> None:
    key = service.new_key()
    sandbox_id = _create(key)
    ids = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(GUEST_PORT)}
    with _guests():
        streams = Streams(ids)
        begun = time.monotonic()
        assert ask(API_PORT, "DELETE", f"/sandboxes/{sandbox_id}", X_API_Key=key)[0] == 204
        streams.end()
        assert time.monotonic() - begun < 10
        named = {name.replace("-", "_"): value for name, value in ids.items()}
        status, body = ask(DATA_PORT, "GET", "/", **named)
        assert (status, body["message"]) == (502, "The sandbox was not found")
        streams.close()


@pytest.fixture
def sdk(
    service: WholeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], None]]:
    """The SDK's settings; the call turns what goes to sandboxes' envd over to a real one."""
    monkeypatch.setenv("E2B_API_URL", f"http://127.0.0.1:{API_PORT}")
    monkeypatch.setenv("E2B_SANDBOX_URL", f"http://127.0.0.1:{DATA_PORT}")
    monkeypatch.setenv("E2B_API_KEY", service.new_key())
    with running_envd(tmp_path / "envd") as envd:
        rule = f"ip daddr 10.88.0.0/24 tcp dport 49983 redirect to :{envd.port}"
        hook = "type nat hook output priority -100"
        table = f"table ip turned {{\nchain out {{\n{hook}\n{rule}\n}}\n}}\n"

        def turn() -> None:
            subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True, timeout=30)

        yield turn
        subprocess.run(["nft", "delete", "table", "ip", "turned"], check=False, timeout=30)


def test_twenty_commands_of_the_sdk(service: WholeService, sdk: Callable[[], None]) -> None:
    command = [sys.executable, sdk_commands.__file__, GOOD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:

        def told() -> Any:
            assert program.stdout is not None
            return json.loads(program.stdout.readline())

        def go_on() -> None:
            assert program.stdin is not None
            program.stdin.write("\n")
            program.stdin.flush()

        sandbox_id = told()
        sdk()
        go_on()
        assert told() == [None] * STREAMS
        for part in ("the API", "the router", "noded"):
            _kill_all_of(service, part)
        ids = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "49983"}
        _until(lambda: _data_status(ids) == 404, "no new request passes")
        go_on()
        assert told() == [None] * STREAMS
        go_on()
        assert told() == [[0] * STREAMS, [f"up\nafter {number}\n" for number in range(STREAMS)]]
        go_on()
        assert told() == [["timed out"] * STREAMS, False]
        go_on()
        assert program.wait(PATIENCE_S) == 0
