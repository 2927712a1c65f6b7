"""Files up and down, beside a plain http.server on the same machine: at least half as quick.

Both are given the best of several tries, in turn, so that a busy machine is as busy for both, and
more of them where other lanes run beside this one.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from envd_client import request
from envd_harness import DEADLINE_SECONDS, SOURCE_ROOT, Envd, free_port

pytestmark = pytest.mark.root

SIZE_BYTES = 50_000_000
TRIES = 5
TRIES_AT_MOST = 30
LEAST_RATIO = 0.5
OCTETS = {"Content-Type": "application/octet-stream"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=B0undary"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One kind of transfer, by envd and by the plain server."""

    method: str
    envd_target: str
    plain_target: str
    headers: dict[str, str]
    body: bytes | None


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE_BYTES)


@pytest.fixture
def plain_port() -> Iterator[int]:
    """A plain server whose files are in memory, as envd's are in these tests."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        port = free_port()
        program = str(SOURCE_ROOT / "tests/support/plain_http_server.py")
        process = subprocess.Popen(
            [sys.executable, program, folder, "127.0.0.1", str(port)], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield port
        finally:
            process.kill()
            process.communicate()


def multipart(content: bytes) -> bytes:
    head = b'--B0undary\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    return head + content + b"\r\n--B0undary--\r\n"


def seconds(port: int, way: Way, target: str) -> float:
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    try:
        connection.request(way.method, target, body=way.body, headers=way.headers)
        answer = connection.getresponse()
        assert answer.status == 200
        while answer.read(1 << 20):
            pass
    finally:
        connection.close()
    return time.perf_counter() - began


def peak_bytes(envd: Envd) -> int:
    status = Path(f"/proc/{envd.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("kind", ["down", "up", "up multipart"])
def test_at_least_half_as_quick_as_a_plain_server(
    kind: str, envd: Envd, plain_port: int, content: bytes
) -> None:
    body = {"down": None, "up": content, "up multipart": multipart(content)}[kind]
    way = Way(
        method="GET" if body is None else "POST",
        envd_target="/files?path=/tmp/large",
        plain_target="/large",
        headers={"down": {}, "up": OCTETS, "up multipart": MULTIPART}[kind],
        body=body,
    )
    request(envd, "POST", way.envd_target, content, OCTETS)
    request_plain = http.client.HTTPConnection("127.0.0.1", plain_port, timeout=DEADLINE_SECONDS)
    request_plain.request("POST", way.plain_target, body=content)
    request_plain.getresponse().read()
    request_plain.close()
    ours, plain = [], []
    while len(ours) < TRIES or (len(ours) < TRIES_AT_MOST and min(plain) / min(ours) < LEAST_RATIO):
        ours.append(seconds(envd.port, way, way.envd_target))
        plain.append(seconds(plain_port, way, way.plain_target))
    megabytes = SIZE_BYTES / 1e6
    figures = (
        f"{kind}: envd {megabytes / min(ours):.0f} MB/s, plain {megabytes / min(plain):.0f} MB/s"
    )
    sys.stdout.write(f"{figures}, n = {len(ours)}\n")
    assert min(plain) / min(ours) >= LEAST_RATIO, figures
    back = request(envd, "GET", way.envd_target).body
    assert hashlib.sha256(back).digest() == hashlib.sha256(content).digest()
    assert peak_bytes(envd) < 100_000_000, "memory grows with the file"
