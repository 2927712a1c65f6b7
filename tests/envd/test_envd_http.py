"""HTTP on the wire: framing, keep-alive, ranges, browsers, and requests that are none."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import time

import pytest
from envd_client import JSON, STREAM, Answer, frame, request, shell, unary
from envd_harness import Envd, wait_until

pytestmark = pytest.mark.root


def raw(envd: Envd, data: bytes, *, half_close: bool = True) -> bytes:
    """Everything the server answers to `data` until it hangs up."""
    with envd.connect() as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        while piece := sock.recv(65536):
            received += piece
        return received


def write(envd: Envd, path: str, data: bytes) -> None:
    answer = request(
        envd,
        "POST",
        f"/files?path={path}",
        data,
        {"Content-Type": "application/octet-stream"},
    )
    assert answer.status == 200, answer


def test_health_needs_nothing(envd: Envd) -> None:
    answer = request(envd, "GET", "/health")
    assert (answer.status, answer.body) == (204, b"")
    assert "content-length" not in answer.headers
    assert request(envd, "HEAD", "/health").status == 204


def test_one_connection_serves_many_requests_sent_ahead(envd: Envd) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    stat = b"POST /filesystem.Filesystem/Stat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
    stat += b'\r\nContent-Length: 15\r\n\r\n{"path":"/tmp"}'
    answers = raw(envd, (head + stat) * 40)
    assert answers.count(b"HTTP/1.1 204 ") == 40
    assert answers.count(b"HTTP/1.1 200 ") == 40


def test_every_byte_alone(envd: Envd) -> None:
    body = b'{"path":"/tmp"}'
    data = (
        b"POST /filesystem.Filesystem/Stat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json; charset=utf-8\r\nConnection: close\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % byte for byte in body)
        + b"0\r\n\r\n"
    )
    with envd.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in data:
            sock.sendall(bytes([byte]))
        received = b""
        while piece := sock.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 200 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["entry"]["path"] == "/tmp"


def test_expect_continue(envd: Envd) -> None:
    head = (
        b"POST /files?path=/tmp/expected HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        b"Content-Type: application/octet-stream\r\nContent-Length: 3\r\n\r\n"
    )
    with envd.connect() as sock:
        sock.sendall(head)
        assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"abc")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    # Refused by its head: no invitation, and the connection is over.
    refused = raw(envd, head.replace(b"octet-stream", b"pdf"), half_close=False)
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert b"100 " not in refused.split(b"\r\n")[0]
    assert envd.path("/tmp/expected").read_bytes() == b"abc"


def test_a_refused_upload_is_answered_and_the_connection_goes_on(envd: Envd) -> None:
    size = 20_000_000
    head = (
        b"POST /files?path=/tmp HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
        b"Content-Length: %d\r\n\r\n" % size
    )
    with envd.connect() as sock:
        sock.sendall(head + bytes(size) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while b"HTTP/1.1 204" not in received:
            received += sock.recv(65536)
    assert received.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /init HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n{}\n",
        b"POST /init HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/3.0\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nbad name: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /init HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"GET /%zz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
)
def test_ambiguous_or_broken_requests_are_refused(envd: Envd, head: bytes) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = raw(envd, head + smuggled, half_close=False)
    status = int(answer.split()[1])
    assert status in (400, 501, 505)
    # What follows is never taken for a request.
    assert b" 204 " not in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == status


@pytest.mark.parametrize(
    "head",
    [
        b"HEAD / HTTP/2.1\r\nHost: x\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_a_refused_head_request_has_no_body_and_ends(envd: Envd, head: bytes) -> None:
    """It was sent one, which h11 does not let pass, and the connection stayed open for ever."""
    answer = raw(envd, head, half_close=False)
    assert int(answer.split()[1]) in (400, 404, 505)
    assert answer.endswith(b"\r\n\r\n")


def test_a_head_without_end(envd: Envd) -> None:
    answer = raw(envd, b"GET / HTTP/1.1\r\nX: " + b"a" * 400_000, half_close=False)
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_unknown_paths_and_methods(envd: Envd) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/process.Process/Nothing", 404),
        ("DELETE", "/files", 405),
        ("GET", "/process.Process/List", 405),
        ("PUT", "/health", 405),
    ):
        answer = request(envd, method, path)
        assert (answer.status, answer.json()["code"]) == (status, status)
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "content_type"),
    [
        ("process.Process/List", "application/connect+proto"),
        ("process.Process/List", "application/connect+json"),
        ("process.Process/Start", "application/proto"),
        ("process.Process/Start", "application/json"),
        ("process.Process/Start", "application/grpc"),
        ("process.Process/List", "application/json; charset=latin1"),
        ("process.Process/List", ""),
    ],
)
def test_other_codecs_are_named_and_refused(envd: Envd, method: str, content_type: str) -> None:
    answer = request(envd, "POST", "/" + method, b"{}", {"Content-Type": content_type})
    assert answer.status == 415
    assert answer.headers["accept-post"].startswith("application/")
    assert "content type" in answer.json()["message"]


def connect_error(answer: Answer) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/json"
    return answer.status, answer.json()["code"]


def test_unary_errors(envd: Envd) -> None:
    stat = "filesystem.Filesystem/Stat"
    assert connect_error(unary(envd, stat, {"path": "/no"})) == (404, "not_found")
    assert connect_error(unary(envd, stat, {"path": 1})) == (400, "invalid_argument")
    assert connect_error(unary(envd, stat, [1])) == (400, "invalid_argument")
    bad_version = unary(envd, stat, {"path": "/"}, {"Connect-Protocol-Version": "2"})
    assert connect_error(bad_version) == (400, "invalid_argument")
    bad_timeout = unary(envd, stat, {"path": "/"}, {"Connect-Timeout-Ms": "soon"})
    assert connect_error(bad_timeout) == (400, "invalid_argument")
    packed = unary(envd, stat, {"path": "/"}, {"Content-Encoding": "br"})
    assert connect_error(packed) == (501, "unimplemented")
    bad_user = unary(envd, stat, {"path": "/"}, {"Authorization": "Basic !"})
    assert connect_error(bad_user) == (401, "unauthenticated")
    assert connect_error(unary(envd, stat, {"path": "x" * 40_000_000}))[1] == "resource_exhausted"


def test_requests_may_be_packed(envd: Envd) -> None:
    packed = gzip.compress(b'{"path":"/tmp"}')
    headers = {**JSON, "Content-Encoding": "gzip"}
    answer = request(envd, "POST", "/filesystem.Filesystem/Stat", packed, headers)
    assert answer.json()["entry"]["path"] == "/tmp"
    for bad, code in (
        (packed[:-1], "invalid_argument"),
        (b"no gzip", "invalid_argument"),
        (gzip.compress(b" " * 40_000_000), "resource_exhausted"),
    ):
        refused = request(envd, "POST", "/filesystem.Filesystem/Stat", bad, headers)
        assert connect_error(refused)[1] == code
    message = gzip.compress(json.dumps(shell("echo packed")).encode())
    body = struct.pack(">BI", 1, len(message)) + message
    for named, ends_well in ((True, True), (False, False)):
        extra = {"Connect-Content-Encoding": "gzip"} if named else {}
        answer = request(envd, "POST", "/process.Process/Start", body, {**STREAM, **extra})
        assert (b"error" not in answer.body) == ends_well


def test_old_clients_get_only_fields_they_know(envd: Envd) -> None:
    entry = unary(
        envd, "filesystem.Filesystem/Stat", {"path": "/tmp"}, {"User-Agent": "connect-python"}
    ).json()["entry"]
    assert entry == {"name": "tmp", "type": "FILE_TYPE_DIRECTORY", "path": "/tmp"}


class TestBrowsers:
    def test_preflight_needs_no_token_and_echoes(self, envd: Envd) -> None:
        answer = request(
            envd,
            "OPTIONS",
            "/process.Process/Start",
            headers={
                "Origin": "https://example.org",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "x-access-token,connect-timeout-ms",
            },
        )
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert answer.headers["access-control-allow-headers"] == "x-access-token,connect-timeout-ms"

    def test_a_method_nobody_allows(self, envd: Envd) -> None:
        headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "TRACE"}
        answer = request(envd, "OPTIONS", "/files", headers=headers)
        assert "access-control-allow-origin" not in answer.headers

    @pytest.mark.parametrize("path", ["/health", "/nothing", "/files?path=/no"])
    def test_answers_are_readable_for_pages(self, envd: Envd, path: str) -> None:
        answer = request(envd, "GET", path, headers={"Origin": "https://example.org"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "Connect-Protocol-Version" in answer.headers["access-control-expose-headers"]


class TestDownload:
    def test_head_ranges_and_conditions(self, envd: Envd) -> None:
        write(envd, "/tmp/range", b"0123456789")
        target = "/files?path=/tmp/range"
        whole = request(envd, "GET", target)
        assert whole.body == b"0123456789"
        assert whole.headers["content-disposition"] == "inline; filename=range"
        assert whole.headers["vary"] == "Accept-Encoding"
        head = request(envd, "HEAD", target)
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "10")
        part = request(envd, "GET", target, headers={"Range": "bytes=2-4"})
        assert (part.status, part.body) == (206, b"234")
        assert part.headers["content-range"] == "bytes 2-4/10"
        last = request(envd, "GET", target, headers={"Range": "bytes=-3"})
        assert last.body == b"789"
        outside = request(envd, "GET", target, headers={"Range": "bytes=10-"})
        assert (outside.status, outside.headers["content-range"]) == (416, "bytes */10")
        modified = whole.headers["last-modified"]
        same = request(envd, "GET", target, headers={"If-Modified-Since": modified})
        assert (same.status, same.body) == (304, b"")
        early = {"If-Unmodified-Since": "Sun, 06 Nov 1994 08:49:37 GMT"}
        assert request(envd, "GET", target, headers=early).status == 412
        stale = {"Range": "bytes=0-0", "If-Range": "Sun, 06 Nov 1994 08:49:37 GMT"}
        assert request(envd, "GET", target, headers=stale).status == 200
        fresh = {"Range": "bytes=0-0", "If-Range": modified}
        assert request(envd, "GET", target, headers=fresh).status == 206

    def test_gzip_only_when_it_is_what_the_client_wants(self, envd: Envd) -> None:
        write(envd, "/tmp/zip", b"a" * 1_000_000)
        target = "/files?path=/tmp/zip"
        packed = request(envd, "GET", target, headers={"Accept-Encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert len(packed.body) < 10_000
        assert gzip.decompress(packed.body) == b"a" * 1_000_000
        for headers in ({"Accept-Encoding": "zstd,gzip,br"}, {}):
            plain = request(envd, "GET", target, headers=headers)
            assert (plain.headers.get("content-encoding"), len(plain.body)) == (None, 1_000_000)

    @pytest.mark.parametrize(
        ("accepted", "status", "packed"),
        [
            ("gzip;q=0.5", 200, True),
            ("GZIP", 200, True),
            ("identity;q=0, gzip", 200, True),
            ("*;q=0, gzip;q=0.1", 200, True),
            ("gzip;q=0", 200, False),
            ("identity", 200, False),
            ("*", 200, False),
            ("br", 200, False),
            ("identity;q=0", 406, False),
            ("*;q=0", 406, False),
            ("br, identity;q=0.000", 406, False),
        ],
    )
    def test_what_the_client_accepts(
        self, envd: Envd, accepted: str, status: int, packed: bool
    ) -> None:
        write(envd, "/tmp/accepted", b"a" * 1000)
        headers = {"Accept-Encoding": accepted}
        answer = request(envd, "GET", "/files?path=/tmp/accepted", headers=headers)
        assert (answer.status, "content-encoding" in answer.headers) == (status, packed)

    def test_files_whose_size_is_a_promise_are_read_to_their_end(self, envd: Envd) -> None:
        # sysfs says 4096 for every file
        answer = request(envd, "GET", "/files?path=/sys/kernel/mm/transparent_hugepage/enabled")
        assert answer.status == 200
        assert b"never" in answer.body

    def test_a_client_that_half_closes_gets_its_file(self, envd: Envd) -> None:
        write(envd, "/tmp/to-the-end", bytes(5_000_000))
        with envd.connect() as sock:
            sock.sendall(b"GET /files?path=/tmp/to-the-end HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            received = 0
            while piece := sock.recv(1 << 20):
                received += len(piece)
        assert received > 5_000_000

    def test_a_slow_reader_stops_nobody_and_costs_no_memory(self, envd: Envd) -> None:
        write(envd, "/tmp/large", bytes(80_000_000))
        with envd.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(b"GET /files?path=/tmp/large HTTP/1.1\r\nHost: x\r\n\r\n")
            assert slow.recv(10)
            for _ in range(5):
                began = time.monotonic()
                assert request(envd, "GET", "/health").status == 204
                assert time.monotonic() - began < 1
            peak = envd.path("/proc/1/status").read_text().partition("VmRSS:")[2].split()[0]
            assert int(peak) < 80_000
        envd.path("/tmp/large").unlink()

    def test_a_file_cut_while_sent_breaks_the_connection(self, envd: Envd) -> None:
        write(envd, "/tmp/cut", bytes(60_000_000))
        with envd.connect() as sock:
            sock.sendall(b"GET /files?path=/tmp/cut HTTP/1.1\r\nHost: x\r\n\r\n")
            received = len(sock.recv(65536))
            with envd.path("/tmp/cut").open("r+b") as file:
                file.truncate(100)
            while piece := sock.recv(1 << 20):
                received += len(piece)
        assert received < 60_000_000

    def test_descriptors_come_back(self, envd: Envd) -> None:
        before = envd.open_descriptors()
        write(envd, "/tmp/large", bytes(20_000_000))
        for _ in range(10):
            with envd.connect() as sock:
                sock.sendall(b"GET /files?path=/tmp/large HTTP/1.1\r\nHost: x\r\n\r\n")
                assert sock.recv(10)
        wait_until(lambda: envd.open_descriptors() <= before, "closed descriptors")


MULTIPART = {"Content-Type": "multipart/form-data; boundary=B"}


class TestUpload:
    def part(self, name: str, filename: str, data: bytes) -> bytes:
        head = f'--B\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"'
        return head.encode() + b"\r\n\r\n" + data + b"\r\n"

    def test_other_parts_are_passed_over(self, envd: Envd) -> None:
        body = self.part("note", "/tmp/note", b"no") + self.part("file", "/tmp/yes", b"yes")
        answer = request(envd, "POST", "/files", body + b"--B--", MULTIPART)
        assert answer.json() == [{"path": "/tmp/yes", "name": "yes", "type": "file"}]
        assert not envd.path("/tmp/note").exists()

    def test_the_same_path_twice(self, envd: Envd) -> None:
        body = self.part("file", "/tmp/twice", b"1") + self.part("file", "/tmp/./twice", b"2")
        answer = request(envd, "POST", "/files", body + b"--B--", MULTIPART)
        assert answer.status == 400
        assert "/tmp/twice" in answer.json()["message"]

    def test_a_body_that_ends_early_leaves_no_new_file(self, envd: Envd) -> None:
        body = self.part("file", "/tmp/half", b"x" * 100_000)
        answer = request(envd, "POST", "/files", body, MULTIPART)
        assert answer.status == 400
        cut = request(
            envd,
            "POST",
            "/files?path=/tmp/half",
            gzip.compress(b"x" * 1000)[:-3],
            {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"},
        )
        assert cut.status == 400
        assert not envd.path("/tmp/half").exists()

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"5\r\nabcde\r\n0\r\n\r\n", 200),
            (b"5;ext=1 \r\nabcde\r\n0\r\nTrailer: x\r\n\r\n", 200),
            (b"5\r\nabcdeX0\r\n\r\n", 400),
            (b"5\nabcde\n0\n\n" + b"x" * 5000, 400),
            (b"-5\r\nabcde\r\n0\r\n\r\n", 400),
            (b"5\r\nabcde\r\n0\r\nno trailer\r\n\r\n", 400),
            (b"x" * 10_000, 400),
        ],
    )
    @pytest.mark.parametrize("step", [1, 7, 1 << 20])
    def test_bodies_in_chunks(self, envd: Envd, body: bytes, status: int, step: int) -> None:
        path = f"/tmp/chunks-{os.urandom(4).hex()}"
        head = (
            f"POST /files?path={path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        ahead = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" if status == 200 else b""
        data = head + body + ahead
        before = envd.open_descriptors()
        with envd.connect() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                for start in range(0, len(data), step):
                    sock.sendall(data[start : start + step])
            except OSError:
                assert status == 400, "hung up on"
            if ahead:
                answer = b""
                while b"204" not in answer:
                    piece = sock.recv(65536)
                    assert piece, answer
                    answer += piece
            else:
                answer = sock.recv(65536)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        if status == 200:
            assert envd.path(path).read_bytes() == b"abcde"
        else:
            assert not envd.path(path).exists()
        wait_until(lambda: envd.open_descriptors() <= before, "closed descriptors")

    def test_large_bodies_with_a_request_sent_ahead(self, envd: Envd) -> None:
        content = os.urandom(700_000)
        chunked = b"".join(
            b"%x\r\n%b\r\n" % (len(piece), piece)
            for piece in (content[n : n + 65_537] for n in range(0, len(content), 65_537))
        )
        ahead = b"GET /files?path=/tmp/ahead HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        for framing, body in (
            (b"Content-Length: %d" % len(content), content),
            (b"Transfer-Encoding: chunked", chunked + b"0\r\n\r\n"),
        ):
            write(envd, "/tmp/ahead", b"old")
            head = b"POST /files?path=/tmp/ahead HTTP/1.1\r\nHost: x\r\n" + framing
            head += b"\r\nContent-Type: application/octet-stream\r\n\r\n"
            answers = raw(envd, head + body + ahead + ahead)
            assert answers.count(b"HTTP/1.1 200") == 2
            assert answers.endswith(content)

    def test_a_client_that_leaves_leaves_no_new_file(self, envd: Envd) -> None:
        with envd.connect() as sock:
            sock.sendall(
                b"POST /files?path=/tmp/left HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
                b"Content-Type: application/octet-stream\r\n\r\n" + bytes(500_000)
            )
            wait_until(envd.path("/tmp/left").exists, "the begun file")
        wait_until(lambda: not envd.path("/tmp/left").exists(), "the file's removal")

    def test_what_cannot_be_an_upload(self, envd: Envd) -> None:
        octets = {"Content-Type": "application/octet-stream"}
        for target, headers, status in (
            ("/files", octets, 400),
            ("/files?path=~x/y", octets, 400),
            ("/files?path=a%00b", octets, 400),
            ("/files?path=/" + "x" * 300, octets, 400),
            ("/files?path=/tmp/x", {"Content-Type": "text/plain"}, 400),
            ("/files?path=/tmp/x", {**octets, "Content-Encoding": "br"}, 415),
            ("/files?path=/tmp/x", {**octets, "X-Metadata-a": "\u00e9"}, 400),
            ("/files?path=/tmp/x&username=who", octets, 401),
            ("/files?path=/tmp/x", {"Content-Type": "multipart/form-data"}, 400),
        ):
            answer = request(envd, "POST", target, b"x", headers)
            assert (answer.status, answer.json()["code"]) == (status, status), (target, headers)


def test_metrics_and_envs(envd: Envd) -> None:
    metrics = request(envd, "GET", "/metrics").json()
    assert metrics["mem_total"] > metrics["mem_used"] > 0
    assert metrics["disk_total"] >= metrics["disk_used"] >= 0
    assert metrics["cpu_count"] >= 1
    assert 0 <= metrics["cpu_used_pct"] <= 100
    assert request(envd, "GET", "/envs").json() == {"E2B_SANDBOX": "true"}


def test_two_hundred_connections_at_once(envd: Envd) -> None:
    sockets = [envd.connect() for _ in range(200)]
    try:
        for sock in sockets:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert all(sock.recv(100).startswith(b"HTTP/1.1 204") for sock in sockets)
    finally:
        for sock in sockets:
            sock.close()


def test_a_stream_with_two_messages(envd: Envd) -> None:
    body = frame({"process": {"cmd": "true"}}) * 2
    answer = request(
        envd, "POST", "/process.Process/Start", body, {"Content-Type": "application/connect+json"}
    )
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/connect+json"
    assert json.loads(answer.body[5:])["error"]["code"] == "unimplemented"
