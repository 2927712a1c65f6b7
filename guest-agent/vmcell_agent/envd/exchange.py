"""One HTTP request and its response, as the endpoints see them; the connection is behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmcell_protos.errors import CODES, CallerError

from .loop import report_bug

Headers = Sequence[tuple[str, str]]


class HttpError(Exception):
    """An answer other than 2xx of a plain endpoint: `{"code": status, "message": ...}`."""

    def __init__(self, status: int, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, kw_only=True)
class Request:
    """The head of a request; header names in lower case, repeated ones joined by commas."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


# A piece of a request's body; a memoryview is valid during the call only.
Octets = bytes | memoryview


class BodyReader(Protocol):
    """Takes the request's body; either method may raise HttpError or CallerError."""

    def feed(self, chunk: Octets) -> None: ...

    def finish(self) -> None: ...


class FilePart:
    """`left` bytes of an open regular file from `offset` on; the descriptor is its giver's.

    `sent` is called once all of them are on their way.
    """

    __slots__ = ("descriptor", "left", "offset", "sent")

    def __init__(self, descriptor: int, offset: int, left: int, sent: Callable[[], None]) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.left = left
        self.sent = sent

    def __len__(self) -> int:
        return self.left


class Transport(Protocol):
    """What an exchange needs of its connection."""

    def send_head(self, status: int, headers: list[tuple[str, str]]) -> None: ...

    def send_body(self, data: bytes) -> None: ...

    def send_file(self, part: FilePart) -> None: ...

    def send_end(self) -> None: ...

    def abort(self) -> None: ...

    def hold_body(self, held: bool) -> None: ...

    def unsent_bytes(self) -> int: ...

    def want_more(self) -> None: ...


class Exchange:
    """A request being answered: `reply` once, or `begin`, `write`..., `end`.

    After the client went away every sending method does nothing and `gone` is true; `on_gone` is
    called once, unless the response had ended. `on_drained` is called each time the response's
    unsent bytes have fallen low. `pull` is asked for the next piece whenever there is room.
    `fail_with` turns an error into this kind of exchange's answer.
    """

    def __init__(self, request: Request, transport: Transport) -> None:
        self.request = request
        self._transport = transport
        self.begun = False
        self.ended = False
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self.on_drained: Callable[[], None] | None = None
        self.pull: Callable[[], bytes | None] | None = None
        self.sends_file = False
        # Set by an endpoint whose body may be large and of unstated length.
        self.expects_much = False
        self.fail_with: Callable[[HttpError | CallerError], None] = self._fail_plainly
        self.extra_headers: list[tuple[str, str]] = []

    @property
    def unsent_bytes(self) -> int:
        return 0 if self.gone else self._transport.unsent_bytes()

    def reply(self, status: int, headers: Headers = (), body: bytes = b"") -> None:
        """The whole response; `body` is left out for HEAD, 204 and 304."""
        if self.gone or self.ended:
            return
        length = [] if status in (204, 304) else [("Content-Length", str(len(body)))]
        self.begin(status, [*headers, *length])
        if body and length and self.request.method != "HEAD":
            self.write(body)
        self.end()

    def reply_json(self, status: int, value: object, headers: Headers = ()) -> None:
        body = json.dumps(value, separators=(",", ":")).encode("ascii")
        self.reply(status, [("Content-Type", "application/json"), *headers], body)

    def begin(self, status: int, headers: Headers) -> None:
        """The head; without Content-Length among `headers` the body goes out in chunks."""
        if self.gone or self.begun:
            return
        self.begun = True
        self._transport.send_head(status, [*headers, *self.extra_headers])

    def write(self, data: bytes) -> None:
        if not self.gone and not self.ended and data:
            self._transport.send_body(data)

    def end(self) -> None:
        if not self.gone and not self.ended:
            self.ended = True
            self.pull = None
            self._transport.send_end()

    def stream_from(self, pull: Callable[[], bytes | None]) -> None:
        """Send what `pull` returns, piece by piece at the client's pace; None is the end."""
        self.pull = pull
        if not self.gone:
            self._transport.want_more()

    def send_file(self, part: FilePart) -> None:
        """The whole body, which the kernel takes from the file at the client's pace."""
        if not self.gone and not self.ended:
            self.sends_file = True
            self._transport.send_file(part)

    def cut(self) -> None:
        """Break the connection off: the response begun cannot be completed honestly."""
        if not self.gone:
            self._transport.abort()

    def hold_body(self, held: bool) -> None:
        """Stop (or go on) reading the request's body: back-pressure to the client."""
        if not self.gone and not self.ended:
            self._transport.hold_body(held)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it; what it raises becomes the answer. A bug is reported and answered with 500."""
        try:
            action()
        except (HttpError, CallerError) as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - one request's bug must not end the sandbox
            report_bug(self.request.path, error)
            self.fail(CallerError("envd failed to serve this request", code="internal"))

    def fail(self, error: HttpError | CallerError) -> None:
        """Answer with the error; when a response has begun already, cut it off."""
        if self.gone or self.ended:
            return
        self.pull = None
        self.fail_with(error)

    def _fail_plainly(self, error: HttpError | CallerError) -> None:
        if self.begun:
            self.cut()
            return
        if isinstance(error, HttpError):
            status, headers = error.status, error.headers
        else:
            status, headers = CODES[error.code].http, ()
        self.reply_json(status, {"code": status, "message": str(error)}, headers)


class WholeBody:
    """A BodyReader that gathers at most `limit_bytes`, then calls `done` with the body."""

    def __init__(self, limit_bytes: int, done: Callable[[bytes], None]) -> None:
        self._limit_bytes = limit_bytes
        self._done = done
        self._body = bytearray()

    def feed(self, chunk: Octets) -> None:
        self._body += chunk
        if len(self._body) > self._limit_bytes:
            raise CallerError(
                f"message size is larger than the limit of {self._limit_bytes} bytes",
                code="resource_exhausted",
            )

    def finish(self) -> None:
        self._done(bytes(self._body))
