"""Any bytes at all: the server answers or hangs up, goes on serving, and keeps nothing.

That nothing of it is a bug of ours is asserted by the fixture, which reads the server's stderr.
"""

from __future__ import annotations

import gzip
import socket
import struct

import pytest
from envd_client import frame, request
from envd_harness import Envd, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.root

_PATHS = [
    b"/files?path=/tmp/fuzz",
    b"/files/compose",
    b"/init",
    b"/metrics",
    b"/health",
    b"/process.Process/Start",
    b"/process.Process/Connect",
    b"/process.Process/List",
    b"/process.Process/SendInput",
    b"/process.Process/StreamInput",
    b"/filesystem.Filesystem/Stat",
    b"/filesystem.Filesystem/ListDir",
    b"/filesystem.Filesystem/MakeDir",
    b"/filesystem.Filesystem/Move",
    b"/filesystem.Filesystem/WatchDir",
]
_HEADERS = [
    b"Host: x",
    b"Content-Length: 5",
    b"Content-Length: 9999",
    b"Transfer-Encoding: chunked",
    b"Expect: 100-continue",
    b"Connection: close",
    b"Content-Type: application/json",
    b"Content-Type: application/connect+json",
    b"Content-Type: application/proto",
    b"Content-Type: application/connect+proto",
    b"Connect-Content-Encoding: gzip",
    b"Content-Type: application/octet-stream",
    b"Content-Type: multipart/form-data; boundary=B",
    b"Content-Encoding: gzip",
    b"Range: bytes=1-2",
    b"Connect-Timeout-Ms: 50",
    b"Origin: http://x",
    b"Access-Control-Request-Method: POST",
    b"X-Metadata-a: b",
]
_BODIES = [
    frame({"process": {"cmd": "echo", "args": ["x"]}}),
    frame({"process": {"cmd": "cat"}, "pty": {"size": {"cols": 3, "rows": 4}}}),
    frame({"start": {"process": {"pid": 7}}}) + frame({"data": {"input": {"stdin": "eA=="}}}),
    frame({"path": "/tmp", "recursive": True}),
    # the same in protobuf: Start of echo, and Stat of /tmp
    b"\0\0\0\0\x0b\x0a\x09\x0a\x04echo\x12\x01x",
    b"\x0a\x04/tmp",
    gzip.compress(b'{"path":"/tmp"}'),
    b'{"source_paths":["/tmp/fuzz","/tmp/fuzz2"],"destination":"/tmp/fuzz3"}',
    b'{"path":"/proc","depth":4}',
    b'{"path":"/tmp/fuzz-directory"}',
    b'{"source":"/tmp/fuzz","destination":"/tmp/fuzz-directory/x"}',
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="/tmp/fuzz2"\r\n\r\nx\r\n--B--',
    b"5\r\nabcde\r\n0\r\n\r\n",
    b"{\0}\0",
]


def whole_request(method: bytes, path: bytes, headers: list[bytes], body: bytes) -> bytes:
    """A request that is well-framed; what it means is another matter."""
    lines = [header for header in headers if b"ength" not in header and b"chunked" not in header]
    lines += [b"Host: x", b"Connect-Timeout-Ms: 50", b"Content-Length: %d" % len(body)]
    return method + b" " + path + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


methods = st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT"])
headers = st.lists(st.sampled_from(_HEADERS), max_size=6)
bodies = st.sampled_from(_BODIES) | st.binary(max_size=60)
requests = st.builds(whole_request, methods, st.sampled_from(_PATHS), headers, bodies)
pieces = (
    st.sampled_from([*_PATHS, *_BODIES, b" ", b"\r\n", b" HTTP/1.1\r\n", b"POST "])
    | headers.map(b"\r\n".join)
    | st.binary(max_size=20)
)
streams = st.lists(requests, min_size=1, max_size=4).map(b"".join) | st.lists(pieces).map(b"".join)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams, st.integers(1, 400), st.booleans(), st.sampled_from(["close", "half", "reset"]))
@example(b"", 1, False, "close")
def test_no_bytes_break_the_server(
    envd: Envd, data: bytes, step: int, answer_read: bool, end: str
) -> None:
    before = envd.open_descriptors()
    with envd.connect() as sock:
        sock.settimeout(0.05)
        try:
            for start in range(0, len(data), step):
                sock.sendall(data[start : start + step])
            if end == "half":
                sock.shutdown(socket.SHUT_WR)
            if answer_read:
                sock.recv(65536)
        except OSError:
            # Hung up on, reset, or nothing to say: all fair answers to such bytes.
            pass
        if end == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert request(envd, "GET", "/health").status == 204
    wait_until(lambda: envd.open_descriptors() <= before, "closed descriptors")
