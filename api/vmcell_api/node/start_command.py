"""A template's start command, and the wait for its ready command, through envd in the guest.

Both are run as root by a login shell, as E2B's are. The start command goes on when nobody listens
any longer; the ready command is repeated inside the guest until it succeeds.
Source: E2B envd's `process.Process/Start`; the Connect protocol, "Streaming RPCs".
"""

from __future__ import annotations

import base64
import http.client
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from vmcell_api.node.guest_init import ENVD_PORT, SLICE_S
from vmcell_protos.errors import CallerError, HostError

MAX_FRAME_BYTES = 4 << 20
# The end of what a command printed, for the sentence about its failure.
TOLD_BYTES = 600
CONNECT_S = 5.0
_PREFIX = struct.Struct(">BI")
_END_OF_STREAM = 0x02
# What reading raises when the guest answers with something else than the protocol's messages.
_NOT_CONNECT = (ValueError, TypeError, AttributeError, KeyError, struct.error)
# Any image has sh; with bash a command finds what E2B's users expect.
_SHELL = 'if command -v bash >/dev/null; then exec bash -l -c "$0"; else exec sh -l -c "$0"; fi'
_UNTIL = 'until sh -c "$1" "$0"; do sleep 0.1; done'


@dataclass(frozen=True, kw_only=True)
class StartCommand:
    """What an image's labels ask for; "" where it asks for nothing."""

    start: str = ""
    ready: str = ""


@dataclass
class _Outcome:
    """How a command ended: status -1 for a signal or a lost stream, then `why` says more."""

    name: str
    status: int = -1
    why: str = "its stream was lost"
    printed: bytearray = field(default_factory=bytearray)

    def __str__(self) -> str:
        tail = bytes(self.printed[-TOLD_BYTES:]).decode("utf-8", "replace").strip()
        how = f"status {self.status}" if self.status >= 0 else self.why
        return (
            f"the template's {self.name} command ended with {how}: {tail or 'it printed nothing'}"
        )


class _Stream:
    """One command of the guest, read by a thread of its own until it ends or `close`.

    `begun` is set when the command runs, or when it never will; its outcome is then in `ended`.
    """

    def __init__(
        self,
        name: str,
        address: str,
        token: str,
        arguments: list[str],
        ended: queue.Queue[_Outcome],
    ) -> None:
        self.begun = threading.Event()
        self._address = address
        self._outcome = _Outcome(name)
        self._ended = ended
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(
            target=self._follow, args=(token, arguments), name=f"{name}-command", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening; the command is not told."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _follow(self, token: str, arguments: list[str]) -> None:
        connection = http.client.HTTPConnection(self._address, ENVD_PORT, timeout=CONNECT_S)
        try:
            connection.connect()
            with self._lock:
                if self._closed:
                    return
                self._socket = connection.sock
            for event in _events(connection, token, arguments):
                self._take(event)
                self.begun.set()
        except (OSError, http.client.HTTPException, *_NOT_CONNECT) as error:
            self._outcome.why = f"its stream was lost ({error or type(error).__name__})"
        finally:
            with self._lock:
                self._socket = None
            connection.close()
            self._ended.put(self._outcome)
            self.begun.set()

    def _take(self, event: dict[str, dict[str, object]]) -> None:
        outcome = self._outcome
        for piece in event.get("data", {}).values():
            outcome.printed += base64.b64decode(str(piece))
            del outcome.printed[:-TOLD_BYTES]
        if (end := event.get("end")) is not None:
            status = end.get("exitCode", 0)
            outcome.status = status if end.get("exited") and isinstance(status, int) else -1
            outcome.why = str(end.get("status"))


def _events(
    connection: http.client.HTTPConnection, token: str, arguments: list[str]
) -> Iterator[dict[str, dict[str, object]]]:
    """What envd says about a command of `/bin/sh -c` that it starts; raises ValueError."""
    message = {"process": {"cmd": "/bin/sh", "args": ["-c", *arguments]}, "stdin": False}
    payload = json.dumps(message).encode()
    headers = {
        "Content-Type": "application/connect+json",
        "Connect-Protocol-Version": "1",
        "Authorization": "Basic " + base64.b64encode(b"root:").decode(),
    }
    if token:
        headers["X-Access-Token"] = token
    body = _PREFIX.pack(0, len(payload)) + payload
    connection.request("POST", "/process.Process/Start", body=body, headers=headers)
    connection.sock.settimeout(None)
    with connection.getresponse() as answer:
        if answer.status != 200:
            words = answer.read(400).decode("utf-8", "replace")
            raise ValueError(f"envd answered {answer.status}: {words}")
        while prefix := answer.read(_PREFIX.size):
            flags, length = _PREFIX.unpack(prefix)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a message of {length} bytes")
            content = json.loads(answer.read(length))
            if flags & _END_OF_STREAM:
                if "error" in content:
                    raise ValueError(str(content["error"].get("message")))
                return
            yield content["event"]


def run(
    address: str,
    command: StartCommand,
    *,
    access_token: str,
    timeout_s: float,
    died: threading.Event,
) -> None:
    """Starts `command.start` and returns when `command.ready` has succeeded.

    Without a ready command it returns as soon as the start command runs. Raises CallerError when
    the start command fails or nothing is ready in time, HostError when the machine has ended.
    """
    if not command.start and not command.ready:
        return
    wait = _Wait(time.monotonic() + timeout_s, timeout_s, died)
    ended: queue.Queue[_Outcome] = queue.Queue()
    streams = []
    try:
        if command.start:
            arguments = [_SHELL, command.start]
            streams.append(_Stream("start", address, access_token, arguments, ended))
        if command.ready:
            arguments = [_UNTIL, command.ready, _SHELL]
            streams.append(_Stream("ready", address, access_token, arguments, ended))
            _await_ready(command.ready, ended, wait)
        else:
            _await_begin(streams[0], ended, wait)
    finally:
        for stream in streams:
            stream.close()


@dataclass(frozen=True)
class _Wait:
    """How long to wait, and for what to give up."""

    deadline: float
    timeout_s: float
    died: threading.Event

    def slice_s(self, what: str) -> float:
        """How long to wait at a time; raises when `what` has waited long enough."""
        if self.died.is_set():
            raise HostError(f"the machine ended before {what}")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise CallerError(
                f"within {self.timeout_s:.0f} s of the start it did not come so far: {what}; "
                "see what the template's start and ready commands wait for",
                code="failed_precondition",
            )
        return min(SLICE_S, left)


def _await_ready(ready: str, ended: queue.Queue[_Outcome], wait: _Wait) -> None:
    what = f"the template's ready command {ready[:200]!r} succeeded"
    while True:
        try:
            outcome = ended.get(timeout=wait.slice_s(what))
        except queue.Empty:
            continue
        # a start command may well end by itself, having left a service behind
        if outcome.status != 0:
            raise CallerError(str(outcome), code="failed_precondition")
        if outcome.name == "ready":
            return


def _await_begin(stream: _Stream, ended: queue.Queue[_Outcome], wait: _Wait) -> None:
    while not stream.begun.wait(wait.slice_s("the template's start command began")):
        pass
    with suppress(queue.Empty):
        outcome = ended.get_nowait()
        if outcome.status != 0:
            raise CallerError(str(outcome), code="failed_precondition")
