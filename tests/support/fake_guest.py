"""A server that stands in a guest behind the data plane: tells what arrived, streams, upgrades.

`/stream…` sends "first", then nothing until `release` is set; `/ticks…` sends a line for each
`tick()` until `end_ticks()`; `/steer` answers with the headers with which an upstream steers nginx.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE_S = 30


class Ticker:
    """A number that streams wait for; thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.number = 0
        self.ended = False

    def tick(self) -> int:
        """Lets every stream send one more line; answers its number."""
        with self._changed:
            self.number += 1
            self._changed.notify_all()
            return self.number

    def end(self) -> None:
        """Lets every stream end."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def after(self, number: int) -> int | None:
        """Waits for a number above `number`; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.number > number or self.ended, 600)
            return None if self.number <= number else number + 1


class GuestHandler(BaseHTTPRequestHandler):
    """One request; the server's `release` and `ticker` rule its streams."""

    protocol_version = "HTTP/1.1"
    release = threading.Event()
    ticker = Ticker()

    def _answer(self) -> None:
        size = self._drain()
        if self.path.startswith("/stream"):
            self._stream()
        elif self.path.startswith("/ticks"):
            self._ticks()
        elif self.headers.get("Upgrade"):
            self._upgrade()
        else:
            self._tell(size)

    do_GET = do_POST = do_HEAD = do_OPTIONS = do_DELETE = do_PUT = _answer

    def _tell(self, size: int) -> None:
        told = {
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body_bytes": size,
        }
        body = json.dumps(told).encode()
        self.send_response(403 if self.path == "/own403" else 200)
        if self.path.startswith("/steer"):
            self.send_header("X-Accel-Redirect", self.path.removeprefix("/steer"))
            self.send_header("X-Accel-Limit-Rate", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _drain(self) -> int:
        if self.headers.get("Transfer-Encoding") != "chunked":
            left = size = int(self.headers.get("Content-Length", 0))
            while left:
                left -= len(self.rfile.read(min(left, 65536)))
            return size
        size = 0
        while length := int(self.rfile.readline(), 16):
            size += len(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return size

    def _begin_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _stream(self) -> None:
        """The second part comes only after the client has shown that it has the first."""
        self._begin_chunks()
        self._chunk(b"first")
        assert self.release.wait(PATIENCE_S)
        self._chunk(b"second")
        self._chunk(b"")

    def _ticks(self) -> None:
        self._begin_chunks()
        number: int | None = self.ticker.number
        assert number is not None
        self._chunk(b"%d\n" % number)
        with contextlib.suppress(ConnectionError):
            while (number := self.ticker.after(number)) is not None:
                self._chunk(b"%d\n" % number)
            self._chunk(b"")
        self.close_connection = True

    def _upgrade(self) -> None:
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.end_headers()
        self.wfile.write(self.connection.recv(100).upper())
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    block_on_close = False


@contextlib.contextmanager
def fake_guest(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """The port of a guest's server; its threads are in the caller's network namespace."""
    server = _Server((address, port), GuestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
