"""noded's metrics: asked of envd, kept bounded, found again by the next noded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_api.guest_http import fetch, parse_answer
from vmcell_api.metric_sample import (
    RECORD_BYTES,
    MetricSample,
    parse_envd_metrics,
    thinned,
    unpack,
)
from vmcell_api.node import sandbox_files
from vmcell_api.node.metrics import MOST_SAMPLES, History, MetricSampler
from vmcell_api.node.sandbox import Sandbox
from vmcell_protos.errors import GuestError, HostError

FAST = settings(max_examples=150, deadline=None)
SANDBOX_ID = "i" + "m" * 19
TOLD = {
    "cpu_count": 2,
    "cpu_used_pct": 3.5,
    "mem_total": 100,
    "mem_used": 50,
    "mem_cache": 10,
    "disk_used": 7,
    "disk_total": 9,
}


def _sample(unix_ms: int) -> MetricSample:
    return parse_envd_metrics(json.dumps(TOLD).encode(), unix_ms)


class Envd(BaseHTTPRequestHandler):
    """A guest: `answer` to whoever has the token."""

    token = "t0ken"
    answer = json.dumps(TOLD).encode()
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        is_known = self.headers.get("X-Access-Token", "") == self.token
        body = self.answer if is_known else b'{"code": 401}'
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def envd() -> Iterator[tuple[type[Envd], int]]:
    handler = type("OwnEnvd", (Envd,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield handler, server.server_port
        server.shutdown()
        thread.join(10)


def _sandbox(sandbox_id: str = SANDBOX_ID) -> Sandbox:
    return Sandbox(
        sandbox_id=sandbox_id,
        template_id="t",
        image="i",
        vcpus=1,
        memory_mib=1,
        slot_number=1,
        address="127.0.0.1",
    )


def _write_files(folder: Path, sandbox_id: str = SANDBOX_ID, token: str = "t0ken") -> None:
    sandbox_files.write(
        str(folder), sandbox_id, address="127.0.0.1", nameservers=(), access_token=token
    )


def test_a_round_asks_every_sandbox(envd: tuple[type[Envd], int], tmp_path: Path) -> None:
    handler, port = envd
    other = "i" + "n" * 19
    running = [_sandbox(), _sandbox(other)]
    for sandbox in running:
        _write_files(tmp_path, sandbox.sandbox_id)
    sampler = MetricSampler(lambda: running, str(tmp_path), interval_s=0, port=port)
    for _ in range(3):
        sampler.ask_all()
    found = sampler.read([SANDBOX_ID, other], start_unix_ms=0, end_unix_ms=0, newest_only=False)
    assert {key: len(rows) for key, rows in found.items()} == {SANDBOX_ID: 3, other: 3}
    assert found[SANDBOX_ID][0].cpu_used_pct == 3.5
    newest = sampler.read([other], start_unix_ms=0, end_unix_ms=0, newest_only=True)
    assert newest == {other: found[other][-1:]}
    again = MetricSampler(lambda: running, str(tmp_path), interval_s=0, port=port)
    assert again.read([other], start_unix_ms=0, end_unix_ms=0, newest_only=False) == {
        other: found[other]
    }, "the next noded finds the history"
    running.pop()
    sandbox_files.remove(str(tmp_path), other)
    sampler.ask_all()
    assert set(
        sampler.read([SANDBOX_ID, other], start_unix_ms=0, end_unix_ms=0, newest_only=False)
    ) == {SANDBOX_ID}
    assert sandbox_files.present(str(tmp_path)) == [SANDBOX_ID], "no folder came back"
    assert handler.asked == 7


def test_the_thread_asks_by_itself(envd: tuple[type[Envd], int], tmp_path: Path) -> None:
    _, port = envd
    _write_files(tmp_path)
    seen = threading.Event()
    rounds = iter(range(1000))

    def running() -> list[Sandbox]:
        if next(rounds) >= 3:
            seen.set()
        return [_sandbox()]

    sampler = MetricSampler(running, str(tmp_path), interval_s=0.01, port=port)
    sampler.start()
    assert seen.wait(20)
    sampler.stop()
    found = sampler.read([SANDBOX_ID], start_unix_ms=0, end_unix_ms=0, newest_only=False)
    times = [sample.unix_ms for sample in found[SANDBOX_ID]]
    assert len(times) >= 2
    assert times == sorted(times)


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"[]", b"x" * 9000, b'{"cpu_used_pct": 1e999}', b"\xff"]
)
def test_a_guest_that_answers_nonsense_is_said_once(
    envd: tuple[type[Envd], int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    answer: bytes,
) -> None:
    handler, port = envd
    handler.answer = answer
    _write_files(tmp_path)
    sampler = MetricSampler(lambda: [_sandbox()], str(tmp_path), interval_s=0, port=port)
    for _ in range(3):
        sampler.ask_all()
    assert sum(SANDBOX_ID in record.getMessage() for record in caplog.records) == 1
    found = sampler.read([SANDBOX_ID], start_unix_ms=0, end_unix_ms=0, newest_only=False)
    assert found == {SANDBOX_ID: []}


def test_a_slow_guest_is_given_up(tmp_path: Path) -> None:
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                while not ended.is_set():
                    try:
                        connection.sendall(b"H")
                    except OSError:
                        return
                    ended.wait(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        started = time.monotonic()
        with pytest.raises(HostError, match=r"slow|timed out"):
            fetch(
                "127.0.0.1",
                "/metrics",
                access_token="",
                limit_bytes=4096,
                timeout_s=0.5,
                port=server.getsockname()[1],
            )
        assert time.monotonic() - started < 5
        ended.set()
        thread.join(10)


def test_a_refusal_and_a_closed_port(envd: tuple[type[Envd], int]) -> None:
    _, port = envd
    with pytest.raises(GuestError, match="401"):
        fetch("127.0.0.1", "/x", access_token="no", limit_bytes=99, timeout_s=5, port=port)
    with pytest.raises(HostError, match="did not answer"):
        fetch("127.0.0.1", "/x", access_token="", limit_bytes=99, timeout_s=5, port=1)


def test_a_history_is_bounded_and_keeps_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    history = History(path)
    count = 3 * MOST_SAMPLES
    for number in range(count):
        history.add(_sample(number))
    kept = history.between(0, 0)
    assert len(kept) <= MOST_SAMPLES
    assert path.stat().st_size == len(kept) * RECORD_BYTES
    times = [sample.unix_ms for sample in kept]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (0, count - 1)
    newest = MOST_SAMPLES // 3
    assert times[-newest:] == list(range(count - newest, count)), "the newest are all there"
    assert History(path).between(0, 0) == kept


def test_a_record_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    history = History(path)
    history.add(_sample(1))
    history.add(_sample(2))
    path.write_bytes(path.read_bytes()[:-3])
    again = History(path)
    assert [sample.unix_ms for sample in again.between(0, 0)] == [1]
    again.add(_sample(3))
    assert [sample.unix_ms for sample in History(path).between(0, 0)] == [1, 3]


def test_only_root_reads_the_token(tmp_path: Path) -> None:
    _write_files(tmp_path)
    path = tmp_path / ".noded" / SANDBOX_ID / sandbox_files.TOKEN_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert sandbox_files.access_token(str(tmp_path), SANDBOX_ID) == "t0ken"


HEADERS = st.sampled_from(
    [b"", b"Content-Length: 3\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n",
     b"Transfer-Encoding: chunked\r\n", b"Content-Length: x\r\nTransfer-Encoding: chunked\r\n",
     b"A" * 70000 + b": b\r\n", b"A: b\r\n" * 200]
)  # fmt: skip
START = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/9 2x\r\n"]
)


@FAST
@given(st.binary(max_size=60) | st.builds(
    lambda start, headers, body: start + headers + b"\r\n" + body,
    START, HEADERS, st.binary(max_size=40)
    | st.sampled_from([b"3\r\nabc\r\n0\r\n\r\n", b"ffffff\r\n"]),
))  # fmt: skip
def test_any_bytes_of_a_guest_are_an_answer_or_refused(data: bytes) -> None:
    try:
        _, body = parse_answer(data, 30)
    except GuestError:
        return
    assert len(body) <= 31


@FAST
@given(st.lists(st.binary(min_size=1, max_size=2), max_size=40))
def test_thinning_keeps_order_the_first_and_the_newer_half(records: list[bytes]) -> None:
    kept = thinned(records)
    remaining = iter(records)
    assert all(record in remaining for record in kept)
    middle = len(records) // 2
    assert kept[len(kept) - (len(records) - middle) :] == records[middle:]
    assert kept[:1] == records[:1]


@FAST
@given(st.integers(0, 1 << 62), st.integers(0, (1 << 63) - 1), st.floats(0, 1e5))
def test_a_sample_comes_back(unix_ms: int, count: int, share: float) -> None:
    told = {**TOLD, "mem_used": count, "cpu_used_pct": share}
    sample = parse_envd_metrics(json.dumps(told).encode(), unix_ms)
    assert unpack(sample.pack()) == sample


@FAST
@given(st.sampled_from(sorted(TOLD)), st.none() | st.booleans() | st.integers() | st.text())
def test_any_answer_is_a_sample_or_refused(name: str, value: object) -> None:
    try:
        sample = parse_envd_metrics(json.dumps({**TOLD, name: value}).encode(), 1)
    except GuestError as error:
        refusal = error
    else:
        assert unpack(sample.pack()) == sample
        return
    assert name in str(refusal)
