"""envd in the guest: handing over token and environment, and asking whether it is well.

Source: E2B envd's `POST /init` and `GET /health` on port 49983; both are closed to clients.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vmcell_protos.errors import HostError

ENVD_PORT = 49983
# The task has started when envd listens; a guest under load may be a moment late.
CONNECT_PATIENCE_S = 5.0
RETRY_S = 0.02
SLICE_S = 1.0


def initialise(
    address: str,
    *,
    access_token: str,
    environment: dict[str, str] | None,
    default_user: str,
    default_workdir: str = "",
    present_token: str = "",
    timeout_s: float,
    died: threading.Event,
) -> None:
    """Gives envd its token, environment, user and the time, then checks its health.

    `environment` None and a default "" leave what envd has. An envd that was restored from a
    snapshot wants to see the `present_token` it was saved with.

    Raises HostError when it does not answer with success in time, or at once when `died` is set.
    """
    body: dict[str, object] = {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if environment is not None:
        body["envVars"] = environment
    if default_user:
        body["defaultUser"] = default_user
    if default_workdir:
        body["defaultWorkdir"] = default_workdir
    if access_token:
        body["accessToken"] = access_token
    deadline = time.monotonic() + timeout_s
    headers = {"Content-Type": "application/json"}
    if present_token:
        headers["X-Access-Token"] = present_token
    told = _Question("POST", "/init", json.dumps(body).encode(), headers)
    _ask(address, told, deadline, died)
    _ask(address, _Question("GET", "/health"), deadline, died)


@dataclass(frozen=True)
class _Question:
    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def _ask(address: str, question: _Question, deadline: float, died: threading.Event) -> None:
    patience = min(deadline, time.monotonic() + CONNECT_PATIENCE_S)
    while True:
        try:
            status, text = _exchange(address, question, deadline, died)
            break
        except ConnectionRefusedError as error:
            if time.monotonic() > patience:
                raise _silent(address, question, error) from error
            time.sleep(RETRY_S)
        except (OSError, http.client.HTTPException) as error:
            raise _silent(address, question, error) from error
    if status not in (200, 204):
        words = text.decode("utf-8", "replace")[:200]
        raise HostError(
            f"envd of the sandbox at {address} answered {question.method} {question.path} with "
            f"{status}: {words}"
        )


def _exchange(
    address: str, question: _Question, deadline: float, died: threading.Event
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, ENVD_PORT, timeout=SLICE_S)
    try:
        _until_in_time(connection.connect, deadline, died)
        connection.sock.settimeout(max(1.0, deadline - time.monotonic()))
        connection.request(
            question.method, question.path, body=question.body, headers=question.headers
        )
        connection.sock.settimeout(SLICE_S)
        _until_in_time(lambda: connection.sock.recv(1, socket.MSG_PEEK), deadline, died)
        connection.sock.settimeout(max(1.0, deadline - time.monotonic()))
        answer = connection.getresponse()
        return answer.status, answer.read(4096)
    finally:
        connection.close()


def _until_in_time(call: Callable[[], object], deadline: float, died: threading.Event) -> None:
    """Repeats a call that times out after SLICE_S, so that the machine's end is seen between."""
    while True:
        try:
            call()
            return
        except TimeoutError:
            if died.is_set():
                raise ConnectionAbortedError("the machine has ended") from None
            if time.monotonic() > deadline:
                raise


def _silent(address: str, question: _Question, error: Exception) -> HostError:
    return HostError(
        f"envd of the sandbox at {address} did not answer {question.method} {question.path}: "
        f"{error or type(error).__name__}; see the guest's console log"
    )
