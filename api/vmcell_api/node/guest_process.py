"""envd's calls as noded needs them for builds and start commands: run, upload, take a layer.

Source: E2B's process.Process/Start over Connect with the JSON codec: frames of one byte of flags
and four of length; the flag 2 marks the last, which may hold an error. What comes from the guest is
input of a stranger: frames and lines have limits, and a broken answer is the guest's fault.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import urlencode

from vmcell_api.node.guest_init import ENVD_PORT
from vmcell_protos.errors import CODES, CallerError, GuestError, HostError

MAX_FRAME_BYTES = 4 << 20
PIECE_BYTES = 256 * 1024
# envd says "keepalive" while a command is silent.
KEEPALIVE_S = 20
# After the deadline, which envd knows too and has words for.
CUT_AFTER_S = 1.0
SILENCE_S = 90.0
CONNECT_S = 10.0
SHELL = ("/bin/bash", "-l", "-c")

OnOutput = Callable[[str, bytes], None]


class CommandRefused(CallerError):
    """envd did not start the command; the sentence is envd's own, with its code in front."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A shell command; `user` "": the default one, `workdir` "": the user's home."""

    text: str
    user: str = "root"
    workdir: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class GuestProcesses:
    """envd of one sandbox; every call has a connection of its own, so it is thread-safe."""

    def __init__(self, address: str, access_token: str, *, port: int = ENVD_PORT) -> None:
        self._address = address
        self._token = access_token
        self._port = port

    def run(self, command: Command, *, deadline: float, on_output: OnOutput) -> int:
        """Runs to the end and answers the exit status; output comes as it is written.

        `deadline` is of time.monotonic(); after it HostError deadline_exceeded, and envd has killed
        the command. Raises CommandRefused, GuestError for an answer that is none, HostError when
        the guest has gone.
        """
        return exit_status_of(self._events(command, deadline), on_output)

    def start(self, command: Command, *, deadline: float) -> None:
        """Starts it and leaves it running; raises like `run`."""
        for event in self._events(command, deadline):
            if "start" in event:
                return
        raise GuestError("envd ended its answer before the command had started")

    def upload(self, path: str, file: BinaryIO, size: int, *, deadline: float) -> None:
        """Writes `size` bytes of `file` to `path`, as root."""
        query = urlencode({"path": path, "username": "root"})
        headers = {
            "X-Access-Token": self._token,
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size),
        }
        with self._asked("POST", f"/files?{query}", file, headers, deadline) as response:
            text = response.read(4096)
            if response.status >= 300:
                raise HostError(_refusal(f"taking {path}", response.status, text))

    @contextlib.contextmanager
    def layer(self, *, deadline: float) -> Iterator[Iterator[bytes]]:
        """The pieces of the tar of what was written since the last layer; the builder has it."""
        headers = {"X-Access-Token": self._token}
        with self._asked("GET", "/layer", None, headers, deadline) as response:
            if response.status != 200:
                text = response.read(4096)
                raise HostError(_refusal("giving its layer", response.status, text))
            if not response.chunked and response.length is None:
                raise GuestError("envd gives a layer whose end cannot be told")
            yield self._whole(response, deadline)

    def _whole(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
        while True:
            _check_time(deadline)
            try:
                piece = response.read(PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise HostError(
                    f"the layer broke off: {self._why_broken(deadline) or error}", code="aborted"
                ) from error
            if not piece:
                # Of a body with a length http.client takes any end for the end.
                if response.length:
                    raise HostError("the layer broke off", code="aborted")
                return
            yield piece

    def _why_broken(self, deadline: float) -> str:
        """What envd says to the next question after a layer that it could not finish."""
        try:
            with self.layer(deadline=min(deadline, time.monotonic() + CONNECT_S)):
                return ""
        except HostError as error:
            return str(error)

    def _events(self, command: Command, deadline: float) -> Iterator[dict[str, object]]:
        program, *flags = SHELL
        process: dict[str, object] = {
            "cmd": program,
            "args": [*flags, command.text],
            "envs": command.environment,
        }
        if command.workdir:
            process["cwd"] = command.workdir
        body = json.dumps({"process": process, "stdin": False}).encode()
        user = base64.b64encode(f"{command.user}:".encode()).decode()
        headers = {
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "X-Access-Token": self._token,
            "Keepalive-Ping-Interval": str(KEEPALIVE_S),
            "Connect-Timeout-Ms": str(max(1, int((deadline - time.monotonic()) * 1000))),
        }
        if command.user:
            headers["Authorization"] = f"Basic {user}"
        framed = b"\0" + len(body).to_bytes(4, "big") + body
        path = "/process.Process/Start"
        with self._asked("POST", path, framed, headers, deadline) as response:
            if response.status != 200:
                raise GuestError(_refusal("starting", response.status, response.read(4096)))
            yield from frames(response, deadline)

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        body: bytes | BinaryIO | None,
        headers: dict[str, str],
        deadline: float,
    ) -> Iterator[http.client.HTTPResponse]:
        _check_time(deadline)
        connection = http.client.HTTPConnection(
            self._address, self._port, timeout=CONNECT_S, blocksize=PIECE_BYTES
        )
        cut: threading.Timer | None = None
        try:
            connection.connect()
            # A guest that says "100 Continue" without end, or a byte a minute, is never silent.
            left_s = deadline - time.monotonic() + CUT_AFTER_S
            cut = threading.Timer(left_s, _cut, [connection.sock])
            cut.daemon = True
            cut.start()
            connection.sock.settimeout(SILENCE_S)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            if cut is not None:
                cut.cancel()
            connection.close()
            _check_time(deadline)
            raise _lost(method, path.partition("?")[0], error) from error
        try:
            yield response
        finally:
            cut.cancel()
            connection.close()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def exit_status_of(events: Iterator[dict[str, object]], on_output: OnOutput) -> int:
    """The exit status at the end of a command's events; raises GuestError when there is none."""
    for event in events:
        data, end = event.get("data"), event.get("end")
        if isinstance(data, dict):
            for name in ("stdout", "stderr"):
                if isinstance(data.get(name), str):
                    on_output(name, _decode(data[name]))
        if isinstance(end, dict):
            return _exit_status(end)
    raise GuestError("envd ended its answer without the command's exit status")


def frames(response: http.client.HTTPResponse, deadline: float) -> Iterator[dict[str, object]]:
    """The events of a stream; the end frame's error is raised."""
    while True:
        _check_time(deadline)
        head = _exactly(response, 5, deadline)
        length = int.from_bytes(head[1:], "big")
        if length > MAX_FRAME_BYTES:
            raise GuestError(f"envd sent a frame of {length} bytes; at most {MAX_FRAME_BYTES}")
        message = _object(_exactly(response, length, deadline))
        if head[0] & 2:
            _raise_end_error(message.get("error"))
            return
        event = message.get("event")
        if isinstance(event, dict):
            yield event


def _raise_end_error(error: object) -> None:
    if not isinstance(error, dict):
        return
    code, words = str(error.get("code"))[:40], str(error.get("message", ""))[:2000]
    if code == "deadline_exceeded":
        raise HostError("the command did not end in time", code="deadline_exceeded")
    raise CommandRefused(f"{code}: {words}", code=code if code in CODES else "unknown")


def _exactly(response: http.client.HTTPResponse, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            piece = response.read(size - len(data))
        except (OSError, http.client.HTTPException) as error:
            _check_time(deadline)
            raise _lost("reading", "a command's output", error) from error
        if not piece:
            _check_time(deadline)
            raise HostError("the guest ended in the middle of a command", code="aborted")
        data += piece
    return bytes(data)


def _object(data: bytes) -> dict[str, object]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GuestError(f"envd sent a frame that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise GuestError("envd sent a frame that is no JSON object")
    return message


def _exit_status(end: dict[str, object]) -> int:
    """Left out when it is 0 (protobuf JSON); a signal has a status of its own."""
    status = end.get("exitCode", 0)
    if isinstance(status, bool) or not isinstance(status, int) or not -1 <= status <= 255:
        raise GuestError(f"envd's exitCode is {str(status)[:40]!r}")
    if status == 0 and end.get("exited") is not True:
        return 255
    return status


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii.Error is one, and letters beyond ASCII are another
        raise GuestError(f"envd sent output that is not base64: {error}") from error


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise HostError("the build's time is over", code="deadline_exceeded")


def _refusal(what: str, status: int, text: bytes) -> str:
    return f"envd refused {what} with {status}: {text.decode('utf-8', 'replace')[:500]}"


def _lost(method: str, path: str, error: Exception) -> HostError:
    return HostError(
        f"the guest was lost ({method} {path}: {error or type(error).__name__})", code="aborted"
    )
