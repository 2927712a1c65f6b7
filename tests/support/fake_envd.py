"""An envd that runs its commands on this host, as this user: process.Process over Connect with
JSON, written apart from the codecs of the product.

It stands where the data plane does: requests must carry the routing headers, and the token when
one is set. `calls` are the names and messages of what came, in order.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DEADLINE_WORDS = "context deadline exceeded"


class FakeEnvd:
    """What a test sets and looks at; `instead` answers Start with these raw bytes."""

    def __init__(self) -> None:
        self.url = ""
        self.token = ""
        self.instead: bytes | None = None
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.terminals: dict[int, int] = {}  # by pid
        self.input_refusal: tuple[int, dict[str, str]] | None = None

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    envd: FakeEnvd

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/process.Process/")
        headers = {key.lower(): value for key, value in self.headers.items()}
        try:
            if not headers.get("e2b-sandbox-id") or headers.get("e2b-sandbox-port") != "49983":
                raise _Refused(400, "invalid_argument", "no routing headers")
            if headers.get("x-access-token", "") != self.envd.token:
                raise _Refused(401, "unauthenticated", "unauthorized access")
            if name == "Start":
                assert headers["content-type"] == "application/connect+json"
                flags, length = struct.unpack(">BI", body[:5])
                assert (flags, length) == (0, len(body) - 5)
                body = body[5:]
            message = json.loads(body)
            self.envd.calls.append((name, message))
            self.envd.headers.append(headers)
            if name == "Start":
                self._start(message, headers)
            else:
                self._answer(200, getattr(self, f"_{name}")(message))
        except _Refused as error:
            self._answer(error.status, {"code": error.code, "message": str(error)})
        except ConnectionError:
            self.close_connection = True

    def _answer(self, status: int, message: object) -> None:
        body = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _start(self, message: dict[str, Any], headers: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/connect+json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._lock = threading.Lock()
        if self.envd.instead is not None:
            self._chunk(self.envd.instead)
        else:
            self._frame(self._run(message, headers), flags=2)
        self._chunk(b"")

    def _run(self, message: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        """The end-of-stream message."""
        try:
            child = self._terminal_child(message) if "pty" in message else _child(message)
        except OSError as error:
            words = f"error starting process '{message['process']['cmd']}': {error.strerror}"
            return {"error": {"code": "invalid_argument", "message": words}}
        self.envd.running[child.pid] = child
        self._event({"keepalive": {}})
        self._event({"start": {"pid": child.pid}})
        late = threading.Event()
        timer = None
        if "connect-timeout-ms" in headers:
            seconds = int(headers["connect-timeout-ms"]) / 1000
            timer = threading.Timer(seconds, lambda: (late.set(), _kill(child, signal.SIGKILL)))
            timer.start()
        with child:
            outputs = {
                kind: stream.fileno()
                for kind, stream in (("stdout", child.stdout), ("stderr", child.stderr))
                if stream is not None
            }
            if child.pid in self.envd.terminals:
                outputs = {"pty": self.envd.terminals[child.pid]}
            readers = [
                threading.Thread(target=self._pass_on, args=output) for output in outputs.items()
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            code = child.wait()
        if timer is not None:
            timer.cancel()
            timer.join()
        del self.envd.running[child.pid]
        if (terminal := self.envd.terminals.pop(child.pid, None)) is not None:
            os.close(terminal)
        if late.is_set():
            return {"error": {"code": "deadline_exceeded", "message": DEADLINE_WORDS}}
        if code < 0:
            name = {1: "hangup", 9: "killed", 15: "terminated"}[-code]
            self._event({"end": {"exitCode": -1, "exited": False, "status": f"signal: {name}"}})
        else:
            # protobuf's JSON leaves out what is 0.
            end = {"exitCode": code} if code else {}
            self._event({"end": {**end, "exited": True, "status": f"exit status {code}"}})
        return {}

    def _terminal_child(self, message: dict[str, Any]) -> subprocess.Popen[bytes]:
        ours, its = os.openpty()
        termios.tcsetwinsize(ours, _rows_and_columns(message))
        try:
            child = _child(message, terminal=its)
        finally:
            os.close(its)
        self.envd.terminals[child.pid] = ours
        return child

    def _pass_on(self, kind: str, descriptor: int) -> None:
        # EIO: nobody has the terminal any more.
        with contextlib.suppress(ConnectionError, OSError):
            while data := os.read(descriptor, 65536):
                with contextlib.suppress(ConnectionError):
                    self._event({"data": {kind: base64.b64encode(data).decode()}})

    def _event(self, event: dict[str, Any]) -> None:
        self._frame({"event": event})

    def _frame(self, message: dict[str, Any], flags: int = 0) -> None:
        payload = json.dumps(message).encode()
        self._chunk(struct.pack(">BI", flags, len(payload)) + payload)

    def _chunk(self, data: bytes) -> None:
        with self._lock:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _child(self, message: dict[str, Any]) -> subprocess.Popen[bytes]:
        child = self.envd.running.get(message["process"]["pid"])
        if child is None:
            raise _Refused(404, "not_found", "process not found")
        return child

    def _SendInput(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.envd.input_refusal is not None:
            status, body = self.envd.input_refusal
            raise _Refused(status, body["code"], body["message"])
        child = self._child(message)
        if child.pid in self.envd.terminals:
            os.write(self.envd.terminals[child.pid], base64.b64decode(message["input"]["pty"]))
            return {}
        stdin = child.stdin
        assert stdin is not None
        try:
            stdin.write(base64.b64decode(message["input"]["stdin"]))
            stdin.flush()
        except OSError:
            words = "error writing to stdin: the process does not read its input any more"
            raise _Refused(500, "internal", words) from None
        return {}

    def _CloseStdin(self, message: dict[str, Any]) -> dict[str, Any]:
        stdin = self._child(message).stdin
        assert stdin is not None
        with contextlib.suppress(OSError):
            stdin.close()
        return {}

    def _Update(self, message: dict[str, Any]) -> dict[str, Any]:
        terminal = self.envd.terminals[self._child(message).pid]
        termios.tcsetwinsize(terminal, _rows_and_columns(message))
        return {}

    def _SendSignal(self, message: dict[str, Any]) -> dict[str, Any]:
        _kill(self._child(message), signal.Signals[message["signal"].removeprefix("SIGNAL_")])
        return {}

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def _child(message: dict[str, Any], *, terminal: int | None = None) -> subprocess.Popen[bytes]:
    wanted = message["process"]
    pipe = subprocess.PIPE if terminal is None else terminal
    stdin = subprocess.DEVNULL if terminal is None and not message["stdin"] else pipe
    return subprocess.Popen(
        [*(("setsid", "-c") if terminal is not None else ()), wanted["cmd"], *wanted["args"]],
        env={"PATH": os.environ["PATH"], **wanted["envs"]},
        cwd=wanted.get("cwd"),
        stdin=stdin,
        stdout=pipe,
        stderr=pipe,
        start_new_session=terminal is None,  # else by setsid(1), with the terminal as its own
    )


def _rows_and_columns(message: dict[str, Any]) -> tuple[int, int]:
    size = message["pty"]["size"]
    return size["rows"], size["cols"]


def _kill(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are no news; anything else is a fault of a test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # as it came


@contextlib.contextmanager
def fake_envd(address: str = "127.0.0.1", port: int = 0) -> Iterator[FakeEnvd]:
    """A server on a free port of the loopback by default; what still runs ends with it."""
    envd = FakeEnvd()
    handler = type("Handler", (_Handler,), {"envd": envd})
    server = _Server((address, port), handler)
    envd.url = f"http://{address}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield envd
    finally:
        for child in tuple(envd.running.values()):
            _kill(child, signal.SIGKILL)
        server.shutdown()
        thread.join(10)
        server.server_close()
