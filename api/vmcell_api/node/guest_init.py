"""envd in the guest: handing over token and environment, and asking whether it is well.

Source: E2B envd's `POST /init` and `GET /health` on port 49983; both are closed to clients.
"""

from __future__ import annotations

import http.client
import json
import time

from vmcell_protos.errors import HostError

ENVD_PORT = 49983
# The task has started when envd listens; a guest under load may be a moment late.
CONNECT_PATIENCE_S = 5.0
RETRY_S = 0.02


def initialise(
    address: str,
    *,
    access_token: str,
    environment: dict[str, str],
    default_user: str,
    timeout_s: float,
) -> None:
    """Gives envd its token, environment, user and the time, then checks its health.

    Raises HostError when it does not answer with success in time.
    """
    body: dict[str, object] = {
        "envVars": environment,
        "defaultUser": default_user,
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if access_token:
        body["accessToken"] = access_token
    deadline = time.monotonic() + timeout_s
    _ask(address, "POST", "/init", json.dumps(body).encode(), deadline)
    _ask(address, "GET", "/health", None, deadline)


def _ask(address: str, method: str, path: str, body: bytes | None, deadline: float) -> None:
    patience = min(deadline, time.monotonic() + CONNECT_PATIENCE_S)
    while True:
        left_s = max(1.0, deadline - time.monotonic())
        try:
            status, text = _exchange(address, method, path, body, left_s)
            break
        except ConnectionRefusedError as error:
            if time.monotonic() > patience:
                raise _silent(address, method, path, error) from error
            time.sleep(RETRY_S)
        except (OSError, http.client.HTTPException) as error:
            raise _silent(address, method, path, error) from error
    if status not in (200, 204):
        words = text.decode("utf-8", "replace")[:200]
        raise HostError(
            f"envd of the sandbox at {address} answered {method} {path} with {status}: {words}"
        )


def _exchange(
    address: str, method: str, path: str, body: bytes | None, timeout_s: float
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, ENVD_PORT, timeout=timeout_s)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(4096)
    finally:
        connection.close()


def _silent(address: str, method: str, path: str, error: Exception) -> HostError:
    return HostError(
        f"envd of the sandbox at {address} did not answer {method} {path}: "
        f"{error or type(error).__name__}; see the guest's console log"
    )
