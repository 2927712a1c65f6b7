"""envd in a real guest: large files beside a plain http.server there, and many commands at once."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from dev_vm import DevVm
from e2b import Sandbox

from vmcell_tools.dev_image import GUEST_DATA_PORT
from vmcell_tools.dev_ssh import forward_port
from vmcell_tools.dev_vm import running_vm

pytestmark = pytest.mark.vm

PATIENCE_S = 300
SIZE_BYTES = 50_000_000
LEAST_RATIO = 0.5
# One transfer of each kind may meet another lane; more are made only where the first did.
TRIES = 3
PLAIN_PORT = 8000
COMMANDS = 20


@pytest.fixture(scope="module")
def sandbox(service: DevVm) -> Iterator[Sandbox]:
    """One of the base image."""
    with Sandbox.create(template="base", timeout=900, request_timeout=PATIENCE_S) as made:
        yield made


def ask(
    sandbox: Sandbox, port: int, method: str, target: str, body: bytes | None = None
) -> tuple[bytes, float]:
    """The answer's body, and the seconds from the connection to its last byte."""
    address = urlsplit(os.environ["E2B_SANDBOX_URL"])
    headers = {
        **sandbox.connection_config.sandbox_headers,
        "E2b-Sandbox-Id": sandbox.sandbox_id,
        "E2b-Sandbox-Port": str(port),
        "Content-Type": "application/octet-stream",
    }
    began = time.monotonic()
    connection = http.client.HTTPConnection(address.netloc, timeout=PATIENCE_S)
    try:
        connection.request(method, target, body=body, headers=headers)
        answer = connection.getresponse()
        found = answer.read()
        assert answer.status == 200, found[:200]
        return found, time.monotonic() - began
    finally:
        connection.close()


@pytest.mark.deep
def test_large_files_are_equal_and_half_as_quick_as_a_plain_server(sandbox: Sandbox) -> None:
    content = os.urandom(SIZE_BYTES)
    program = Path(__file__).parents[2] / "support" / "plain_http_server.py"
    sandbox.files.write("/tmp/server.py", program.read_bytes(), request_timeout=PATIENCE_S)
    server = sandbox.commands.run(
        f"mkdir -p /tmp/plain && python3 /tmp/server.py /tmp/plain 0.0.0.0 {PLAIN_PORT}",
        background=True,
        timeout=0,
    )
    assert next(iter(server))[0] == "ready\n"
    wanted = hashlib.sha256(content).hexdigest()
    ratios = {"up": 0.0, "down": 0.0}
    figures = ""
    for _ in range(TRIES):
        _, plain_up = ask(sandbox, PLAIN_PORT, "POST", "/large", content)
        _, up = ask(sandbox, 49983, "POST", "/files?path=/tmp/large", content)
        _, plain_down = ask(sandbox, PLAIN_PORT, "GET", "/large")
        back, down = ask(sandbox, 49983, "GET", "/files?path=/tmp/large")
        figures += (
            f"50 MB up: envd {up:.1f} s, plain {plain_up:.1f} s; "
            f"down: envd {down:.1f} s, plain {plain_down:.1f} s\n"
        )
        assert hashlib.sha256(back).hexdigest() == wanted
        ratios = {
            "up": max(ratios["up"], plain_up / up),
            "down": max(ratios["down"], plain_down / down),
        }
        if min(ratios.values()) >= LEAST_RATIO:
            break
    sys.stdout.write(figures)
    told = sandbox.commands.run("sha256sum /tmp/large", timeout=PATIENCE_S).stdout
    assert told.split()[0] == wanted
    assert min(ratios.values()) >= LEAST_RATIO, figures
    server.kill()


def test_twenty_commands_at_once(sandbox: Sandbox, dev_vm: DevVm) -> None:
    # By ssh: QEMU's own forwarding resets some of many connections that come at once.
    port = forward_port(running_vm(dev_vm.name).directory, GUEST_DATA_PORT)
    same = Sandbox.connect(sandbox.sandbox_id, sandbox_url=f"http://127.0.0.1:{port}")

    def run(number: int) -> str:
        command = f"sleep 1; echo {number}"
        options = {"timeout": PATIENCE_S, "request_timeout": PATIENCE_S}
        return same.commands.run(command, **options).stdout

    with ThreadPoolExecutor(COMMANDS) as pool:
        assert list(pool.map(run, range(COMMANDS))) == [f"{n}\n" for n in range(COMMANDS)]
