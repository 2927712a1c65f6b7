"""Connect calls on exchanges: unary, server stream and client stream; JSON and protobuf.

Connect protocol (connectrpc.com/docs/protocol). Unary errors are an HTTP status and a JSON body,
errors of streams are the last frame of a 200, JSON too, whatever the codec. Requests may be packed
with gzip; answers never are, so that they can be passed on as they come. A method that cannot
answer at once keeps its call and answers later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from vmcell_protos.errors import CODES, CallerError
from vmcell_protos.wire import Message

from .accounts import Account
from .exchange import BodyReader, Exchange, HttpError, Octets, WholeBody
from .loop import Loop, Timer
from .settings import Settings
from .wire.codec import JSON, PROTO, Codec
from .wire.compression import CompressionError, TooLarge, unpack
from .wire.envelope import (
    FLAG_COMPRESSED,
    FLAG_END_STREAM,
    EnvelopeDecoder,
    encode_end,
    encode_envelope,
)
from .wire.fields import Fields, dump_message
from .wire.headers import basic_user, timeout_seconds

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
_CODECS = (JSON, PROTO)
_DEFAULT_KEEPALIVE_SECONDS = 90

_HTTP_TO_CODE = {400: "invalid_argument", 401: "unauthenticated", 404: "not_found"}


class Call:
    """One call being answered: `reply` (unary), or `send`... and `finish` (streams).

    `account` is the user the call names, else the default one; reading it may raise CallerError
    unauthenticated. `timeout_s` is the caller's deadline, counted from the call's arrival.
    """

    def __init__(
        self, method: Method, codec: Codec, exchange: Exchange, loop: Loop, settings: Settings
    ) -> None:
        headers = exchange.request.headers
        self.codec = codec
        self.exchange = exchange
        self.loop = loop
        self._method = method
        self._settings = settings
        try:
            self._user = basic_user(headers.get("authorization"))
        except ValueError as error:
            raise CallerError(str(error), code="unauthenticated") from None
        try:
            self.timeout_s = timeout_seconds(headers.get("connect-timeout-ms"))
        except ValueError as error:
            raise CallerError(str(error)) from None
        self.keepalive_s = _keepalive_seconds(headers.get("keepalive-ping-interval"))
        self.user_agent = headers.get("user-agent", "")

    @property
    def account(self) -> Account:
        return self._settings.account(self._user)

    def read(self, body: bytes) -> Fields:
        """A message of the request; CallerError invalid_argument."""
        return self.codec.parse(self._method.request, body)

    def _written(self, message: dict[str, object]) -> bytes:
        return self.codec.dump(self._method.response, message)

    def reply(self, message: dict[str, object]) -> None:
        self.exchange.reply(200, [("Content-Type", self.codec.unary_type)], self._written(message))

    def send(self, message: dict[str, object]) -> None:
        self.send_frame(encode_envelope(self._written(message)))

    def send_frame(self, frame: bytes) -> None:
        """A frame made by `encode_envelope`; the first one sends the head too."""
        self.exchange.begin(200, [("Content-Type", self.codec.stream_type)])
        self.exchange.write(frame)

    def finish(self, code: str | None = None, message: str = "") -> None:
        self.send_frame(encode_end(code, message))
        self.exchange.end()

    def fail(self, error: CallerError) -> None:
        self.exchange.fail(error)

    def at_deadline(self, action: Callable[[], None]) -> Timer | None:
        return None if self.timeout_s is None else self.loop.after(self.timeout_s, action)


Unary = Callable[[Call, Fields], None]


class MessageReader(Protocol):
    """A client stream's messages: `feed` each, `finish` at the end; may raise CallerError."""

    def feed(self, message: Fields) -> None: ...

    def finish(self) -> None: ...


class Method(NamedTuple):
    """A method's messages, and how it is called: exactly one of the last three is set."""

    request: type[Message]
    response: type[Message]
    unary: Unary | None = None
    server_stream: Unary | None = None
    client_stream: Callable[[Call], MessageReader] | None = None


def _keepalive_seconds(text: str | None) -> int:
    if text and text.isascii() and text.isdigit() and 0 < len(text) <= 6 and int(text) > 0:
        return int(text)
    return _DEFAULT_KEEPALIVE_SECONDS


def open_call(method: Method, exchange: Exchange, loop: Loop, settings: Settings) -> BodyReader:
    """Check the call's headers and return what reads its messages.

    Raises HttpError 405 and 415, CallerError for the rest, after setting how errors are told.
    """
    request = exchange.request
    if request.method != "POST":
        raise HttpError(405, "Connect calls are POST requests", [("Allow", "POST")])
    streaming = method.unary is None
    codec = _codec(request.headers.get("content-type", ""), streaming=streaming)
    exchange.fail_with = lambda error: _fail(exchange, error, codec, streaming=streaming)
    packed = _check_protocol(request.headers, streaming=streaming)
    call = Call(method, codec, exchange, loop, settings)
    if method.unary is not None:
        return WholeBody(MAX_MESSAGE_BYTES, _unary_body(method.unary, call, packed=packed))
    if method.server_stream is not None:
        return _OneMessage(method.server_stream, call, packed=packed)
    assert method.client_stream is not None
    return _ManyMessages(method.client_stream(call), call, packed=packed)


def _codec(given: str, *, streaming: bool) -> Codec:
    """The codec that the content type names; HttpError 415 when it is none of ours."""
    media_type, _, parameters = given.partition(";")
    charset = parameters.strip().lower().replace('"', "")
    offered = {codec.stream_type if streaming else codec.unary_type: codec for codec in _CODECS}
    found = offered.get(media_type.strip().lower())
    if found is not None and charset in ("", "charset=utf-8"):
        return found
    raise HttpError(
        415,
        f"content type {given!r} is not supported here: use {' or '.join(offered)}",
        [("Accept-Post", ", ".join(offered))],
    )


def _check_protocol(headers: Mapping[str, str], *, streaming: bool) -> bool:
    """Whether the request's messages are packed with gzip; raises CallerError."""
    version = headers.get("connect-protocol-version")
    if version not in (None, "1"):
        raise CallerError(f'Connect-Protocol-Version must be "1", not {version!r}')
    name = "connect-content-encoding" if streaming else "content-encoding"
    encoding = headers.get(name, "identity")
    if encoding not in ("", "identity", "gzip"):
        raise CallerError(
            f"unknown compression {encoding!r}: supported encodings are gzip and identity",
            code="unimplemented",
        )
    return encoding == "gzip"


def _fail(
    exchange: Exchange, error: HttpError | CallerError, codec: Codec, *, streaming: bool
) -> None:
    if isinstance(error, HttpError):
        code = _HTTP_TO_CODE.get(error.status, "internal")
    else:
        code = error.code
    if streaming:
        exchange.begin(200, [("Content-Type", codec.stream_type)])
        exchange.write(encode_end(code, str(error)))
        exchange.end()
    elif exchange.begun:
        exchange.cut()
    else:
        body: dict[str, object] = {"code": code, "message": str(error)}
        exchange.reply(CODES[code].http, [("Content-Type", JSON.unary_type)], dump_message(body))


def _unpacked(payload: bytes) -> bytes:
    try:
        return unpack(payload, MAX_MESSAGE_BYTES)
    except TooLarge as error:
        raise CallerError(str(error), code="resource_exhausted") from None
    except CompressionError as error:
        raise CallerError(str(error)) from None


def _unary_body(method: Unary, call: Call, *, packed: bool) -> Callable[[bytes], None]:
    return lambda body: method(call, call.read(_unpacked(body) if packed and body else body))


class _Messages:
    """A stream's body as messages, one by one."""

    def __init__(self, call: Call, *, packed: bool) -> None:
        self._call = call
        self._packed = packed
        self._decoder = EnvelopeDecoder(MAX_MESSAGE_BYTES)

    @property
    def pending_bytes(self) -> int:
        return self._decoder.pending_bytes

    def feed(self, chunk: Octets) -> Iterator[Fields]:
        for flags, payload in self._decoder.feed(chunk):
            if flags & FLAG_END_STREAM:
                raise CallerError("a request stream has no end-of-stream message")
            if flags & FLAG_COMPRESSED:
                if not self._packed:
                    raise CallerError("a compressed message came without Connect-Content-Encoding")
                payload = _unpacked(payload)
            yield self._call.read(payload)


class _OneMessage:
    """The body of a server stream's request: exactly one frame."""

    def __init__(self, method: Unary, call: Call, *, packed: bool) -> None:
        self._method = method
        self._call = call
        self._body = _Messages(call, packed=packed)
        self._messages: list[Fields] = []

    def feed(self, chunk: Octets) -> None:
        self._messages += self._body.feed(chunk)
        if len(self._messages) > 1:
            raise CallerError("unary request has multiple messages", code="unimplemented")

    def finish(self) -> None:
        if self._body.pending_bytes or not self._messages:
            raise CallerError("the request's body ends before its message does")
        self._method(self._call, self._messages[0])


class _ManyMessages:
    """The body of a client stream."""

    def __init__(self, reader: MessageReader, call: Call, *, packed: bool) -> None:
        self._reader = reader
        self._body = _Messages(call, packed=packed)

    def feed(self, chunk: Octets) -> None:
        for message in self._body.feed(chunk):
            self._reader.feed(message)

    def finish(self) -> None:
        if self._body.pending_bytes:
            raise CallerError("the request's body ends inside a message")
        self._reader.finish()
