"""Answers of a guest's envd to the node: HTTP, metrics, trees of files, streams of commands.

Faces the guest. What comes is a record in bounds, that fits into the answer to the API, or
GuestError or HostError; a guest's words never end noded's call with anything else.
"""

from __future__ import annotations

import http.client
import io
import json
import time
from dataclasses import asdict

from json_input import expand
from supply import Supply

from vmcell_api.guest_http import parse_answer
from vmcell_api.metric_sample import parse_envd_metrics, unpack
from vmcell_api.node import guest_process
from vmcell_api.node.file_diff import compare, entries_of, row_of
from vmcell_protos.errors import GuestError, HostError
from vmcell_protos.pb import node_pb2

ALLOWED: tuple[type[Exception], ...] = (GuestError, HostError)
REACHES = (
    "vmcell_api.guest_http:parse_answer",
    "vmcell_api.metric_sample:MetricSample.pack",
    "vmcell_api.node.file_diff:compare",
    "vmcell_api.node.guest_process:_exit_status",
    "vmcell_api.node.guest_process:_raise_end_error",
)
HTTP, METRICS, FILES, COMMAND = range(4)
LIMIT_BYTES = 4096


class _Received:
    """Bytes in the place of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def one(data: bytes) -> None:
    supply = Supply(data)
    mode = supply.byte() % 4
    rest = supply.rest()
    if mode == HTTP:
        status, body = parse_answer(rest, LIMIT_BYTES)
        assert 0 <= status <= 999
        assert len(body) <= LIMIT_BYTES + 1
    elif mode == METRICS:
        sample = parse_envd_metrics(expand(rest), 5)
        assert unpack(sample.pack()) == sample
    elif mode == FILES:
        _compare(rest)
    else:
        _command(rest)


def _compare(data: bytes) -> None:
    before, _, after = data.partition(b"\0")
    trees = [
        {path: row_of(entry) for path, entry in entries_of(expand(part))}
        for part in (before, after)
    ]
    for change in compare(*trees):
        node_pb2.FileChange(**asdict(change)).SerializeToString()


def _command(data: bytes) -> None:
    """A whole answer to Start, with its head, as GuestProcesses.run reads it."""
    response = http.client.HTTPResponse(_Received(expand(data)))  # type: ignore[arg-type]
    try:
        response.begin()
    except (http.client.HTTPException, OSError) as error:
        raise GuestError(str(error)) from error
    output: list[bytes] = []
    try:
        status = guest_process.exit_status_of(
            guest_process.frames(response, time.monotonic() + 60),
            lambda _, words: output.append(words),
        )
    except guest_process.CommandRefused as error:
        if len(str(error)) > 4096:
            raise AssertionError("a guest's words are told on without end") from error
        return
    finally:
        response.close()
    assert -1 <= status <= 255


def _frame(value: object, flags: int = 0) -> bytes:
    payload = json.dumps(value).encode()
    return bytes([flags]) + len(payload).to_bytes(4, "big") + payload


def seeds() -> dict[str, bytes]:
    names = ("mem_used", "mem_total", "mem_cache", "disk_used", "disk_total")
    metrics = {"cpu_count": 2, "cpu_used_pct": 1.5, **dict.fromkeys(names, 1000)}
    row = {"path": "/a", "type": "FILE_TYPE_FILE", "size": "12", "mode": 420, "owner": "root"}
    files = json.dumps({"entries": [row, {"path": "/b", "size": 3}]}).encode()
    changed = files.replace(b'"12"', b'"13"')
    events = [{"start": {"pid": 3}}, {"data": {"stdout": "aGk="}}, {"end": {"exited": True}}]
    stream = b"".join(_frame({"event": event}) for event in events) + _frame({}, 2)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n"
    error = _frame({"error": {"code": "not_found", "message": "no such program"}}, 2)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(stream), stream)
    return {
        "answer": b"\0HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        "chunked": b"\0HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "continued": b"\0HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx",
        "metrics": b"\x01" + json.dumps(metrics).encode(),
        "files": b"\x02" + files + b"\0" + changed,
        "command": b"\x03" + head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        "command-refused": b"\x03" + head + b"Content-Length: %d\r\n\r\n" % len(error) + error,
    }
