"""gunicorn is killed with all its workers while 20 commands run in a microVM: none notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable

import pytest
from dev_vm import DevVm
from e2b import Sandbox
from sdk_commands import COMMANDS, Commands

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PATIENCE_S = 300
API_PID = "grep -o 'the API is process [0-9]*' /mnt/out/serve.log | tail -n 1 | grep -o '[0-9]*$'"
# One kill for the pids that were there at one moment: no worker outlives its master to answer.
KILL_API = f'api=$({API_PID}); all="$api $(pgrep -P $api)"; kill -9 $all; echo $all'


def _until(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.2)


def _kill_api(service: DevVm) -> None:
    killed = service.check("sh", "-c", KILL_API).split()
    assert len(killed) > 1, "gunicorn had no workers"
    _until(
        lambda: service.check("sh", "-c", API_PID).strip() != killed[0],
        "the API was not started again",
    )


def _is_listed(service: DevVm, sandbox_id: str) -> bool | None:
    """What the API says; None while it does not answer."""
    request = urllib.request.Request(
        f"{service.api_url}/v2/sandboxes", headers={"X-API-KEY": os.environ["E2B_API_KEY"]}
    )
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        urllib.request.urlopen(request, timeout=PATIENCE_S) as answer,
    ):
        return sandbox_id in {row["sandboxID"] for row in json.load(answer)}
    return None


def test_twenty_commands_and_a_timeout_outlive_the_api(service: DevVm) -> None:
    sandbox = Sandbox.create(template="base", timeout=900, request_timeout=PATIENCE_S)
    sandbox.commands.run("mkfifo /tmp/go", timeout=PATIENCE_S)
    commands = Commands(sandbox, PATIENCE_S)

    _kill_api(service)
    _until(lambda: _is_listed(service, sandbox.sandbox_id) is True, "the sandbox is not listed")
    assert commands.ends == [None] * COMMANDS
    sandbox.commands.run(": > /tmp/go", timeout=PATIENCE_S)
    commands.join()
    assert commands.ends == [0] * COMMANDS
    outputs = ["".join(parts) for parts in commands.outputs]
    assert outputs == [f"up\nafter {number}\n" for number in range(COMMANDS)]

    # Its end comes while there is no API.
    sandbox.set_timeout(1)
    _kill_api(service)
    _until(lambda: _is_listed(service, sandbox.sandbox_id) is False, "the timeout did not fire")
