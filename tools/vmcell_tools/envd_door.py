"""envd of a sandbox, reached from outside: process.Process over the data plane, Connect with JSON.

Where that is: E2B_SANDBOX_URL with routing headers, else a host name below the service's domain,
else the nginx of `vmcell serve`.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from vmcell_agent.envd.wire.envelope import encode_envelope
from vmcell_protos.errors import CODES, CallerError, HostError, VmcellError
from vmcell_tools.api_client import Json, checked_url

DEFAULT_URL = "http://127.0.0.1:3080"
ENVD_PORT = 49983
CALL_WITHIN_S = 60
# envd shows at least so often that it is there.
KEEPALIVE_S = 30
MAX_REFUSAL_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Door:
    """envd of one sandbox, from outside."""

    url: str
    headers: dict[str, str]

    def connect(self, within_s: float) -> http.client.HTTPConnection:
        """A connection that is not open yet."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None  # looked at in `door_of`
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=within_s, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=within_s)

    def call(self, method: str, message: Json) -> None:
        """A unary call of process.Process; raises VmcellError with envd's code."""
        connection = self.connect(CALL_WITHIN_S)
        try:
            response = self._post(
                connection, method, json.dumps(message).encode(), "application/json", {}
            )
            if response.status != 200:
                raise _refusal(response)
            response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def stream(
        self, connection: http.client.HTTPConnection, message: Json, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        """The open answer to process.Process/Start, on a connection that is the caller's."""
        body = encode_envelope(json.dumps(message).encode())
        headers = {**headers, "Keepalive-Ping-Interval": str(KEEPALIVE_S)}
        try:
            response = self._post(connection, "Start", body, "application/connect+json", headers)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if response.status != 200:
            raise _refusal(response)
        return response

    def _post(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        body: bytes,
        content_type: str,
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        connection.request(
            "POST",
            f"/process.Process/{method}",
            body=body,
            headers={
                **self.headers,
                **headers,
                "Content-Type": content_type,
                "Connect-Protocol-Version": "1",
            },
        )
        return connection.getresponse()

    def _unreachable(self, error: Exception) -> HostError:
        return HostError(
            f"the sandbox is not reached at {self.url}: {error}; start the service with "
            "`vmcell serve`, or set E2B_SANDBOX_URL"
        )


def door_of(sandbox: Json) -> Door:
    """The door of a sandbox as `GET /sandboxes/ID` tells it; CallerError when it is paused."""
    sandbox_id = sandbox["sandboxID"]
    wakes = (sandbox.get("lifecycle") or {}).get("autoResume")
    if sandbox["state"] == "paused" and not wakes:
        raise CallerError(
            f"sandbox {sandbox_id} is paused; resume it with: vmcell sandbox resume {sandbox_id}"
        )
    domain = sandbox.get("domain")
    url = os.environ.get("E2B_SANDBOX_URL") or (
        f"https://{ENVD_PORT}-{sandbox_id}.{domain}" if domain else DEFAULT_URL
    )
    headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(ENVD_PORT)}
    if sandbox.get("envdAccessToken"):
        headers["X-Access-Token"] = sandbox["envdAccessToken"]
    return Door(url=checked_url("E2B_SANDBOX_URL", url, like=DEFAULT_URL), headers=headers)


def _refusal(response: http.client.HTTPResponse) -> VmcellError:
    """The sentence of envd, the router or nginx."""
    try:
        told = json.loads(response.read(MAX_REFUSAL_BYTES))
        words, code = str(told["message"]), str(told.get("code", ""))
    except (ValueError, KeyError, TypeError, RecursionError, OSError, http.client.HTTPException):
        words, code = f"the sandbox's door answered {response.status}", ""
    known = code if code in CODES else None
    return HostError(words) if response.status >= 500 else CallerError(words, code=known)
