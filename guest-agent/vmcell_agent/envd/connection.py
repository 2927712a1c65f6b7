"""One client connection: h11 on a non-blocking socket, one exchange after the other.

Requests are framed by h11 alone (RFC 9112), and a request that states its length in two ways is
refused, so that a proxy in front and this server are always of one mind where it ends. Requests
sent ahead wait in the socket until the response before them has ended.

Large bodies are read past h11, which copies each byte several times. What h11 has not seen the end
of cannot be used again, so the next request on the connection gets a fresh one.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import h11

from .exchange import BodyReader, Exchange, FilePart, HttpError, Request
from .file_sending import send_file_piece
from .loop import HUNG_UP, READABLE, WRITABLE, Loop
from .wire.body import Body, BodyError, ChunkedBody, StatedBody
from .wire.headers import http_date
from .wire.target import split_target

RECEIVE_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
# Below it a response's producer is asked for more.
LOW_WATER_BYTES = 128 * 1024
# A connection without a request may wait this long: clients keep idle ones for 300 s.
IDLE_SECONDS = 640.0
# A request whose head or body stands still.
STALLED_SECONDS = 300.0
# How long the rest of a refused body is read and dropped, so that the answer is not lost to a
# reset (RFC 9112 section 9.6).
LINGER_SECONDS = 5.0
# From here on a body of a stated length is read past h11; chunked ones where much is expected.
DIRECT_BODY_BYTES = 64 * 1024
# How many full buffers one connection may take before the others have their turn.
_DIRECT_READS = 4

# What is read past h11 lies here until its reader has taken it; readers keep nothing of it.
_buffer = memoryview(bytearray(RECEIVE_BYTES))

Application = Callable[[Exchange], BodyReader]


class Connection:
    """Owns the socket; `closed` is called once, when the connection is over."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        application: Application,
        closed: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._application = application
        self._closed = closed
        self._http = _new_http()
        # A body that is read past h11, and how much of it h11 had been given with the head.
        self._body: Body | None = None
        self._body_in_http = 0
        self._output: deque[memoryview | FilePart] = deque()
        self._unsent_bytes = 0
        self._exchange: Exchange | None = None
        self._reader: BodyReader | None = None
        self._held = False
        self._end_of_input = False
        self._lingering = False
        self._is_closed = False
        self._pumping = False
        self._events = READABLE
        self._active_at = time.monotonic()
        loop.watch(sock.fileno(), READABLE, self._on_event)

    # What the exchange calls.

    def send_head(self, status: int, headers: list[tuple[str, str]]) -> None:
        assert self._exchange is not None
        if self._http.they_are_waiting_for_100_continue:
            # The client may send the body or not; only a new connection is sure.
            headers = [*headers, ("Connection", "close")]
        head = h11.Response(
            status_code=status,
            headers=[
                (name.encode("ascii"), value.encode("utf-8", "surrogateescape"))
                for name, value in [("Date", http_date(time.time())), *headers]
            ],
        )
        self._queue(self._http.send(head))

    def send_body(self, data: bytes) -> None:
        assert self._exchange is not None
        if self._exchange.request.method == "HEAD":
            return
        pieces = self._http.send_with_data_passthrough(h11.Data(data=data))
        for piece in pieces or ():
            self._queue(piece)
        self._flush()

    def send_file(self, part: FilePart) -> None:
        # h11 counts it and hands it back: it needs nothing of a body but its length.
        data = h11.Data(data=part)  # type: ignore[arg-type]  # only its length is asked
        pieces: list[Any] = self._http.send_with_data_passthrough(data) or []
        for piece in pieces:
            if piece is part:
                self._output.append(part)
            else:
                self._queue(piece)
        self._flush()

    def send_end(self) -> None:
        self._held = False
        self._queue(self._http.send(h11.EndOfMessage()))
        if not self._pumping:
            self._loop.soon(self._pump)
        self._flush()

    def abort(self) -> None:
        self.close()

    def hold_body(self, held: bool) -> None:
        if held == self._held:
            return
        self._held = held
        self._update_events()
        if not held:
            self._loop.soon(self._pump)

    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def want_more(self) -> None:
        self._update_events()

    # What the server calls.

    def stalled(self, now_s: float) -> bool:
        """Whether nothing has moved for so long that the connection should be closed."""
        quiet_s = now_s - self._active_at
        if self._lingering:
            return quiet_s > LINGER_SECONDS
        if self._exchange is None:
            begun = bool(self._sent_ahead())
            return quiet_s > (STALLED_SECONDS if begun else IDLE_SECONDS)
        if self._body is not None:
            body_missing = not self._body.done
        else:
            body_missing = self._http.their_state is h11.SEND_BODY
        body_missing = body_missing and not self._held
        return quiet_s > STALLED_SECONDS and body_missing

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.forget(self._socket.fileno())
        self._socket.close()
        self._output.clear()
        exchange, self._exchange, self._reader = self._exchange, None, None
        if exchange is not None:
            exchange.gone = True
            if exchange.on_gone is not None and not exchange.ended:
                exchange.attempt(exchange.on_gone)
        self._closed(self)

    # Input.

    def _on_event(self, mask: int) -> None:
        if mask & WRITABLE:
            self._flush()
        if mask & ~WRITABLE and not self._is_closed:
            self._receive()
        if mask & HUNG_UP and self._end_of_input:
            # Reset after its end: recv(2) tells the end only, and epoll goes on reporting it.
            self.close()

    def _request_is_complete(self) -> bool:
        if self._body is not None:
            return self._body.done
        return self._http.their_state is h11.DONE

    def _sent_ahead(self) -> bytes:
        """What has been received and belongs to no request yet."""
        rest = b"" if self._body is None else self._body.rest
        return rest + self._http.trailing_data[0][self._body_in_http :]

    def _receive(self) -> None:
        if self._body is not None and not self._body.done and not self._lingering:
            self._receive_direct(self._body)
            return
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # Reset by the client: nothing can be delivered any more.
            self.close()
            return
        self._active_at = time.monotonic()
        if self._lingering:
            if not data:
                self.close()
            return
        if not data:
            self._on_end_of_input()
            return
        self._http.receive_data(data)
        self._pump()

    def _begin_direct(self, headers: Mapping[str, str], *, expects_much: bool) -> None:
        """Take over a large body that has not come with its head."""
        arrived = self._http.trailing_data[0]
        length_bytes = int(headers.get("content-length", "0"))
        if length_bytes >= DIRECT_BODY_BYTES and len(arrived) < length_bytes:
            self._body = StatedBody(length_bytes)
        elif expects_much and headers.get("transfer-encoding", "").lower() == "chunked":
            self._body = ChunkedBody()
        else:
            return
        self._body_in_http = len(arrived)
        self._take_body(self._body, memoryview(arrived))

    def _take_body(self, body: Body, data: memoryview) -> None:
        try:
            for piece in body.take(data):
                self._feed(piece)
                if self._is_closed:
                    return
        except BodyError as error:
            self._refuse(400, str(error))
            return
        if body.done:
            self._finish_body()

    def _receive_direct(self, body: Body) -> None:
        for _ in range(_DIRECT_READS):
            try:
                count = self._socket.recv_into(_buffer, body.wanted(RECEIVE_BYTES))
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.close()
                return
            if not count:
                self._on_end_of_input()
                return
            self._active_at = time.monotonic()
            self._take_body(body, _buffer[:count])
            if self._is_closed or self._held or self._lingering or body.done:
                break
        self._pump()

    def _on_end_of_input(self) -> None:
        self._end_of_input = True
        exchange = self._exchange
        if exchange is not None and not exchange.ended:
            live_stream = exchange.begun and exchange.pull is None and not exchange.sends_file
            if live_stream or not self._request_is_complete():
                # A live stream lost its listener, or the request will never be complete.
                self.close()
                return
        # What has been asked for is still answered; _flush closes after it.
        self._flush()

    def _pump(self) -> None:
        """Take what h11 has understood until it needs more bytes or the exchange must end first."""
        if self._pumping or self._is_closed:
            return
        self._pumping = True
        try:
            while not self._is_closed and not self._held and self._step():
                pass
        finally:
            self._pumping = False
        if not self._is_closed:
            self._update_events()
            self._flush()

    def _step(self) -> bool:
        if self._exchange is not None and self._exchange.ended and not self._next_cycle():
            return False
        if self._body is not None:
            if not self._body.done:
                self._invite_body()
            return False
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            self._refuse(
                status, "the request head is too long" if status == 431 else "invalid request"
            )
            return False
        if event is h11.NEED_DATA:
            self._invite_body()
            return False
        if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            return False
        if isinstance(event, h11.Request):
            return self._open_exchange(event)
        if isinstance(event, h11.Data):
            self._feed(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            self._finish_body()
        return True

    def _next_cycle(self) -> bool:
        """After a response: True when the next request may be read (or a body be drained)."""
        if self._http.our_state is h11.DONE and self._request_is_complete():
            self._exchange = self._reader = None
            if self._body is not None:
                ahead = self._sent_ahead()
                self._http, self._body, self._body_in_http = _new_http(), None, 0
                if ahead:
                    self._http.receive_data(ahead)
            else:
                self._http.start_next_cycle()
            self._active_at = time.monotonic()
            return True
        if self._http.our_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
            return False
        return self._http.their_state is h11.SEND_BODY and self._body is None

    def _open_exchange(self, event: h11.Request) -> bool:
        headers: dict[str, str] = {}
        for raw_name, raw_value in event.headers:
            name, value = raw_name.decode("ascii"), raw_value.decode("utf-8", "surrogateescape")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        method = event.method.decode("ascii")
        if event.http_version not in (b"1.0", b"1.1"):
            self._refuse(505, "HTTP/1.1 is spoken here", method)
            return False
        if "transfer-encoding" in headers and "content-length" in headers:
            # h11 would take the first; a proxy in front may take the second (RFC 9112 11.2).
            self._refuse(400, "both Transfer-Encoding and Content-Length", method)
            return False
        try:
            path, query = split_target(event.target)
            failure = None
        except ValueError as error:
            path, query, failure = "", {}, HttpError(400, f"cannot read the URL: {error}")
        request = Request(method=method, path=path, query=query, headers=headers)
        exchange = Exchange(request, self)
        self._exchange, self._reader = exchange, None
        if failure is not None:
            exchange.fail(failure)
        else:
            exchange.attempt(lambda: self._start(exchange))
        if not self._is_closed:
            self._begin_direct(headers, expects_much=exchange.expects_much)
        return True

    def _start(self, exchange: Exchange) -> None:
        self._reader = self._application(exchange)

    def _feed(self, chunk: bytes | memoryview) -> None:
        reader = self._reader
        exchange = self._exchange
        if reader is not None and exchange is not None and not exchange.ended:
            exchange.attempt(lambda: reader.feed(chunk))

    def _finish_body(self) -> None:
        reader = self._reader
        exchange = self._exchange
        if reader is not None and exchange is not None and not exchange.ended:
            exchange.attempt(reader.finish)

    def _invite_body(self) -> None:
        waiting = self._http.they_are_waiting_for_100_continue
        if waiting and self._exchange is not None and not self._exchange.begun:
            self._queue(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))

    def _refuse(self, status: int, message: str, method: str = "") -> None:
        """The bytes are no HTTP we can follow: say so if still possible, then hang up.

        `method` is that of a request which has no exchange yet.
        """
        exchange = self._exchange
        if exchange is not None:
            method = exchange.request.method
            if exchange.begun:
                self.close()
                return
            if exchange.on_gone is not None:
                # What the endpoint holds for a body that will not come.
                exchange.attempt(exchange.on_gone)
            exchange.begun = exchange.ended = True
        body = f'{{"code":{status},"message":"{message}"}}'.encode("ascii")
        head = h11.Response(
            status_code=status,
            headers=[
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ],
        )
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._queue(self._http.send(head))
            if method != "HEAD":
                self._queue(self._http.send(h11.Data(data=body)))
            self._queue(self._http.send(h11.EndOfMessage()))
        self._linger()

    # Output.

    def _queue(self, data: bytes | None) -> None:
        if data and not self._is_closed:
            self._output.append(memoryview(data))
            self._unsent_bytes += len(data)

    def _flush(self) -> None:
        """Send what can be sent, ask the producer for one more piece, decide what comes next."""
        if not self._is_closed and self._send_queued():
            self._ask_for_more()
            self._after_output()

    def _ask_for_more(self) -> None:
        exchange = self._exchange
        if exchange is not None and self._unsent_bytes <= LOW_WATER_BYTES:
            if exchange.pull is not None and not exchange.ended:
                exchange.attempt(lambda: self._pull_once(exchange))
            elif exchange.on_drained is not None and not exchange.ended:
                exchange.attempt(exchange.on_drained)

    def _after_output(self) -> None:
        if self._is_closed:
            return
        if not self._output and not self._pumping:
            must_close = self._http.our_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)
            answered = self._exchange is None or self._exchange.ended
            if must_close or (self._end_of_input and answered):
                self._linger()
                return
        self._update_events()

    def _pull_once(self, exchange: Exchange) -> None:
        assert exchange.pull is not None
        piece = exchange.pull()
        if piece is None:
            exchange.end()
        else:
            pieces = self._http.send_with_data_passthrough(h11.Data(data=piece))
            for part in pieces or ():
                self._queue(part)

    def _send_queued(self) -> bool:
        """False when the client is gone, or a file is shorter than was promised."""
        while self._output:
            first = self._output[0]
            is_file = isinstance(first, FilePart)
            try:
                if isinstance(first, FilePart):
                    sent = send_file_piece(self._socket, first)
                else:
                    sent = self._socket.sendmsg(_leading_bytes(self._output))
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                # The client went away; whatever it had asked for goes on without it.
                self.close()
                return False
            if not sent:
                # A broken connection is the only honest answer left.
                self.close()
                return False
            self._active_at = time.monotonic()
            self._take_sent(sent)
            if is_file:
                # The others have their turn between two pieces.
                break
        return True

    def _take_sent(self, sent: int) -> None:
        first = self._output[0]
        if isinstance(first, FilePart):
            first.offset += sent
            first.left -= sent
            if not first.left:
                self._output.popleft()
                self._loop.soon(first.sent)
            return
        self._unsent_bytes -= sent
        while sent:
            first = self._output[0]
            assert isinstance(first, memoryview)
            if sent < len(first):
                self._output[0] = first[sent:]
                break
            sent -= len(first)
            self._output.popleft()

    def _linger(self) -> None:
        """Hang up politely: half-close, then drop what still comes for a moment."""
        if self._lingering or self._is_closed:
            return
        if self._output:
            # _flush comes back here once all is sent.
            self._update_events()
            return
        nothing_comes = self._end_of_input or self._request_is_complete()
        if nothing_comes or self._http.their_state not in (h11.SEND_BODY, h11.ERROR):
            self.close()
            return
        self._lingering = True
        self._held = False
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._loop.after(LINGER_SECONDS, self.close)
        self._update_events()

    def _update_events(self) -> None:
        if self._is_closed:
            return
        events = 0
        if self._reads():
            events |= READABLE
        exchange = self._exchange
        pulling = exchange is not None and exchange.pull is not None and not exchange.ended
        if self._output or pulling:
            events |= WRITABLE
        if events != self._events:
            self._events = events
            self._loop.change(self._socket.fileno(), events)

    def _reads(self) -> bool:
        """Read on, unless the body is held back or the next request is here already.

        While a response is under way reading goes on only to notice that the client left.
        """
        if self._end_of_input or self._held:
            return False
        if self._request_is_complete():
            return not self._sent_ahead()
        return True


def _new_http() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)


def _leading_bytes(queue: deque[memoryview | FilePart]) -> list[memoryview]:
    """What one sendmsg(2) may take: at most 16 pieces, up to the first file."""
    found = []
    for n in range(min(len(queue), 16)):
        piece = queue[n]
        if isinstance(piece, FilePart):
            break
        found.append(piece)
    return found
