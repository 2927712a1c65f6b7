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
CLOSED_WITHIN_S = 5.0
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
    """One command of the guest, read by a thread of its own until it ends or `close`."""

    def __init__(
        self,
        name: str,
        address: str,
        token: str,
        arguments: list[str],
        ended: queue.Queue[_Outcome],
    ) -> None:
        self._outcome = _Outcome(name)
        self._ended = ended
        self._connection = http.client.HTTPConnection(address, ENVD_PORT, timeout=CLOSED_WITHIN_S)
        self._thread = threading.Thread(
            target=self._follow, args=(token, arguments), name=f"{name}-command", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening; the command is not told."""
        if (sock := self._connection.sock) is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _follow(self, token: str, arguments: list[str]) -> None:
        try:
            for event in self._events(token, arguments):
                self._take(event)
        except (OSError, http.client.HTTPException, *_NOT_CONNECT) as error:
            self._outcome.why = f"its stream was lost ({error or type(error).__name__})"
        self._ended.put(self._outcome)

    def _take(self, event: dict[str, dict[str, object]]) -> None:
        outcome = self._outcome
        for piece in event.get("data", {}).values():
            outcome.printed += base64.b64decode(str(piece))
            del outcome.printed[:-TOLD_BYTES]
        if (end := event.get("end")) is not None:
            status = end.get("exitCode", 0)
            outcome.status = status if end.get("exited") and isinstance(status, int) else -1
            outcome.why = str(end.get("status"))

    def _events(self, token: str, arguments: list[str]) -> Iterator[dict[str, dict[str, object]]]:
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
        self._connection.request("POST", "/process.Process/Start", body=body, headers=headers)
        assert self._connection.sock is not None
        self._connection.sock.settimeout(None)
        answer = self._connection.getresponse()
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
    deadline = time.monotonic() + timeout_s
    ended: queue.Queue[_Outcome] = queue.Queue()
    streams = []
    try:
        if command.start:
            arguments = [_SHELL, command.start]
            streams.append(_Stream("start", address, access_token, arguments, ended))
        if command.ready:
            arguments = [_UNTIL, command.ready, _SHELL]
            streams.append(_Stream("ready", address, access_token, arguments, ended))
            _await_ready(command, ended, deadline, timeout_s, died)
    finally:
        for stream in streams:
            stream.close()


def _await_ready(
    command: StartCommand,
    ended: queue.Queue[_Outcome],
    deadline: float,
    timeout_s: float,
    died: threading.Event,
) -> None:
    while True:
        if died.is_set():
            raise HostError("the machine ended before its template's ready command succeeded")
        left = deadline - time.monotonic()
        if left <= 0:
            raise CallerError(
                f"the template's ready command {command.ready[:200]!r} did not succeed within "
                f"{timeout_s:.0f} s of the start; see that the start command brings it about",
                code="failed_precondition",
            )
        try:
            outcome = ended.get(timeout=min(SLICE_S, left))
        except queue.Empty:
            continue
        # a start command may well end by itself, having left a service behind
        if outcome.status != 0:
            raise CallerError(str(outcome), code="failed_precondition")
        if outcome.name == "ready":
            return
