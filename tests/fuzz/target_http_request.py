"""HTTP/1.1 requests to envd: framing, Connect calls, multipart uploads, headers, ranges.

Faces clients of the data plane and every process of the guest. Each connection answers well-formed
requests and hangs up on the rest; what the server takes for one request is what h11 alone takes for
one, however the bytes are cut; no reader raises but HttpError and CallerError.
"""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from unittest.mock import patch

from supply import Supply

from vmcell_agent.envd import exchange as exchange_module
from vmcell_agent.envd import rpc
from vmcell_agent.envd.accounts import Account, Accounts, parse_passwd
from vmcell_agent.envd.connection import Connection
from vmcell_agent.envd.exchange import BodyReader, Exchange, HttpError, Octets, WholeBody
from vmcell_agent.envd.loop import Loop
from vmcell_agent.envd.settings import Settings
from vmcell_agent.envd.wire import headers
from vmcell_agent.envd.wire.compression import CompressionError, Gunzip
from vmcell_agent.envd.wire.fields import Fields
from vmcell_agent.envd.wire.multipart import (
    MultipartError,
    MultipartParser,
    PartBegin,
    PartData,
    PartEnd,
    boundary_of,
    header_parameters,
)
from vmcell_agent.envd.wire.signature import SignatureError, check_signature
from vmcell_protos import envd_process
from vmcell_protos.errors import CallerError

ALLOWED: tuple[type[Exception], ...] = ()
REACHES = (
    "vmcell_agent.envd.rpc:_OneMessage.finish",
    "vmcell_agent.envd.rpc:_ManyMessages.finish",
    "vmcell_agent.envd.rpc:_unary_body",
    "vmcell_agent.envd.wire.codec:ProtoCodec.parse",
    "vmcell_agent.envd.wire.body:ChunkedBody._trailer_line",
    "vmcell_agent.envd.wire.multipart:MultipartParser._body",
    "vmcell_agent.envd.wire.compression:Gunzip.feed",
    "vmcell_agent.envd.wire.signature:sign",
    "vmcell_agent.envd.wire.headers:parse_range",
    "vmcell_agent.envd.wire.fields:Fields.text_map",
)
FILE_BYTES = 1000
TURNS = 400
MOST_PIECES = 64


class _BugError(BaseException):
    """What envd would report as a bug and go on; here it is the finding."""


def _bug(where: str, error: BaseException) -> None:
    raise _BugError(f"{where}: {type(error).__name__}: {error}") from error


class _TurningLoop(Loop):
    """One turn at a time, and a callback's exception is ours."""

    def turn(self) -> bool:
        ready = self._epoll.poll(0)
        for descriptor, mask in ready:
            callback = self._callbacks.get(descriptor)
            if callback is not None:
                callback(mask)
        soon = len(self._soon)
        for _ in range(soon):
            self._soon.popleft()()
        return bool(ready or soon)

    def settle(self) -> None:
        for _ in range(TURNS):
            if not self.turn():
                return
        raise AssertionError(f"the connection is still busy after {TURNS} turns")


def one(data: bytes) -> None:
    with patch.object(exchange_module, "report_bug", _bug):
        _converse(Supply(data))


def _converse(supply: Supply) -> None:
    step = 1 + supply.number(2) % 4096
    stream = supply.rest()
    step = max(step, len(stream) // MOST_PIECES)
    loop = _TurningLoop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    over: list[Connection] = []
    connection = Connection(loop, theirs, _application(loop), over.append)
    try:
        answer = b""
        for start in range(0, len(stream), step):
            with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                ours.send(stream[start : start + step])
            loop.settle()
            answer += _received(ours)
        with suppress(OSError):
            ours.shutdown(socket.SHUT_WR)
        loop.settle()
        answer += _received(ours)
        assert not answer or answer.startswith(b"HTTP/1.1 ")
    finally:
        if not over:
            connection.close()
        ours.close()
        loop.close()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20)
    except OSError:
        return b""


def _application(loop: Loop) -> Callable[[Exchange], BodyReader]:
    settings = Settings(_Nobody(), {})

    def take(exchange: Exchange) -> BodyReader:
        request = exchange.request
        exchange.expects_much = request.path == "/files"
        _read_headers(exchange)
        if request.path.startswith("/rpc"):
            return rpc.open_call(_METHODS[len(request.path) % 3], exchange, loop, settings)
        if request.path == "/files":
            return _Upload(exchange)
        return WholeBody(1 << 16, lambda body: exchange.reply(200, body=body[:100]))

    return take


def _read_headers(exchange: Exchange) -> None:
    """What endpoints read of a head; each raises what its own docstring says."""
    given = exchange.request.headers
    with suppress(headers.RangeNotSatisfiable):
        found = headers.parse_range(given.get("range"), FILE_BYTES)
        assert found is None or 0 <= found.start < found.end <= FILE_BYTES
    with suppress(headers.NotAcceptable):
        headers.wants_gzip(given.get("accept-encoding"))
    headers.parse_http_date(given.get("if-modified-since"))
    with suppress(ValueError):
        headers.basic_user(given.get("authorization"))
    with suppress(SignatureError):
        check_signature(exchange.request.query, "read", "token", 1e9)
    name = exchange.request.query.get("path", "f").rpartition("/")[2]
    assert headers.inline_disposition(name).isascii()
    header_parameters(given.get("content-disposition", ""))


def _fields(call: rpc.Call, message: Fields) -> None:
    """Reads a message as Start and ListDir do, and answers."""
    process = message.message("process")
    process.text("cmd")
    process.texts("args")
    process.text_map("envs")
    message.optional_uint32("depth")
    message.octets("data")
    message.optional_boolean("stdin")
    message.which(["pid", "tag"])
    call.at_deadline(lambda: None)
    try:
        call.account  # noqa: B018 # read for what it raises
    except CallerError:
        call.fail(CallerError("who is that?", code="unauthenticated"))
        return
    if call.exchange.request.path.startswith("/rpc00"):
        call.reply({})
    else:
        call.send({})
        call.finish()


class _Nobody(Accounts):
    """Accounts without files."""

    def __init__(self) -> None:
        super().__init__()
        self._by_name = parse_passwd("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/u:/b", {})

    def find(self, name: str) -> Account | None:
        return self._by_name.get(name)


class _Messages:
    def __init__(self, call: rpc.Call) -> None:
        self._call = call

    def feed(self, message: Fields) -> None:
        message.text("path")
        message.optional_message("pty")

    def finish(self) -> None:
        self._call.send({})
        self._call.finish()


_START = (envd_process.StartRequest, envd_process.StartResponse)
_METHODS = (
    rpc.Method(*_START, unary=lambda call, message: call.reply({"event": {}})),
    rpc.Method(*_START, server_stream=_fields),
    rpc.Method(*_START, client_stream=_Messages),
)


class _Upload:
    """A body as /files reads it: packed or not, multipart or not."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        given = exchange.request.headers
        self._gunzip = Gunzip() if given.get("content-encoding") == "gzip" else None
        self._parser: MultipartParser | None = None
        self._in_part = False
        self._bytes = 0
        kind = given.get("content-type", "")
        if kind.startswith("multipart/form-data"):
            try:
                self._parser = MultipartParser(boundary_of(kind))
            except MultipartError as error:
                raise HttpError(400, str(error)) from None

    def feed(self, chunk: Octets) -> None:
        try:
            for piece in self._gunzip.feed(chunk) if self._gunzip else [chunk]:
                self._take(piece)
        except (CompressionError, MultipartError) as error:
            raise HttpError(400, str(error)) from None

    def _take(self, piece: Octets) -> None:
        self._bytes += len(piece)
        if self._bytes > 1 << 24:
            raise HttpError(413, "that much is a bomb")
        for event in self._parser.feed(piece) if self._parser else ():
            if isinstance(event, PartBegin):
                assert not self._in_part
            elif isinstance(event, PartData):
                assert self._in_part
                assert len(event.data) > 0
            self._in_part = not isinstance(event, PartEnd)

    def finish(self) -> None:
        try:
            if self._gunzip:
                self._gunzip.finish()
            if self._parser:
                self._parser.finish()
        except (CompressionError, MultipartError) as error:
            raise HttpError(400, str(error)) from None
        self._exchange.reply_json(200, {"bytes": self._bytes})


def _request(path: str, body: bytes, *rows: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *rows, "", ""]
    return b"\xff\x0f" + "\r\n".join(lines).encode() + body


def _framed(value: object) -> bytes:
    payload = json.dumps(value).encode()
    return b"\0" + len(payload).to_bytes(4, "big") + payload


def seeds() -> dict[str, bytes]:
    process = {"process": {"cmd": "sh", "args": ["-c", "true"], "envs": {"A": "b"}}}
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a b"\r\n\r\n'
    multipart = part + b"content\r\n" + part + b"\r\n--B--\r\n"
    form = "Content-Type: multipart/form-data; boundary=B"
    chunked = b"POST /files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    rows = (
        *("Range: bytes=1-5", "Accept-Encoding: gzip;q=0.5, identity"),
        *("If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT", "Authorization: Basic cm9vdDo="),
    )
    return {
        "get": _request("/f?path=%2Fa&signature=v1_x&signature_expiration=9", b"", method="GET"),
        "head": _request("/f", b"", *rows, method="HEAD"),
        "unary": _request("/rpc00", b'{"depth":1}', "Content-Type: application/json"),
        "start": _request(
            "/rpc",
            _framed(process),
            "Content-Type: application/connect+json",
            "Connect-Timeout-Ms: 50",
        ),
        "messages": _request(
            "/rpc1", _framed({"path": "/"}) * 2, "Content-Type: application/connect+json"
        ),
        "start-proto": _request(
            "/rpc", b"\0\0\0\0\x06\x0a\x04\x0a\x02sh", "Content-Type: application/connect+proto"
        ),
        "multipart": _request("/files", multipart, form),
        "packed": _request(
            "/files", gzip.compress(multipart, mtime=0), form, "Content-Encoding: gzip"
        ),
        "multipart-cut": b"\x02\0" + _request("/files", multipart, form)[2:],
        "chunked": b"\x05\0" + chunked + b"5\r\nabcde\r\n3;x=y\r\nabc\r\n0\r\nT: v\r\n\r\n",
        "two": _request("/a", b"x") + _request("/b", b"y")[2:],
    }
