"""Sandboxes of a running API, as a benchmark asks for them: one connection, no retries."""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse

from vmcell_protos.errors import CallerError, HostError

URL_VARIABLE = "VMCELL_API_URL"
KEY_VARIABLES = ("VMCELL_API_KEY", "E2B_API_KEY")
ANSWER_WITHIN_S = 600.0
LIFE_S = 3600


class ServiceClient:
    """One keep-alive connection; not thread-safe. Calls raise CallerError with the API's own
    sentence for an answer that is none of success, HostError without an answer."""

    def __init__(self, url: str, key: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CallerError(f"{url!r} is no http or https URL; give --url or {URL_VARIABLE} one")
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._connection = kind(parts.hostname, parts.port, timeout=ANSWER_WITHIN_S)
        self._url = url
        self._path = parts.path.rstrip("/")
        self._headers = {"X-API-KEY": key, "Content-Type": "application/json"}

    def close(self) -> None:
        """Ends the connection; idempotent."""
        self._connection.close()

    def create(self, template: str) -> str:
        """The id of a new sandbox."""
        body = {"templateID": template, "timeout": LIFE_S}
        return str(self._ask("POST", "/v2/sandboxes", body)["sandboxID"])

    def kill(self, sandbox_id: str) -> None:
        """Ends a sandbox."""
        self._ask("DELETE", f"/sandboxes/{sandbox_id}")

    def snapshot(self, sandbox_id: str) -> str:
        """The id of a new snapshot of a sandbox that goes on."""
        return str(self._ask("POST", f"/sandboxes/{sandbox_id}/snapshots", {})["snapshotID"])

    def rollback(self, sandbox_id: str, snapshot_id: str) -> None:
        """The sandbox is as the snapshot was."""
        path = f"/vmcell/sandboxes/{sandbox_id}/rollback"
        self._ask("POST", path, {"snapshotID": snapshot_id})

    def remove_snapshot(self, snapshot_id: str) -> None:
        """Snapshots are templates to E2B's clients."""
        self._ask("DELETE", f"/templates/{snapshot_id}")

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        data = None if body is None else json.dumps(body)
        try:
            self._connection.request(method, self._path + path, data, self._headers)
            answer = self._connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next call makes a new one
            raise HostError(
                f"the API does not answer {method} {path} at {self._url}: {error}; start it with"
                " `vmcell serve`, or name another by --url"
            ) from error
        if not 200 <= answer.status < 300:
            raise CallerError(f"{method} {path}: {_sentence(text, answer.status)}")
        found = json.loads(text) if text else {}
        if not isinstance(found, dict):
            raise HostError(f"the API answers {method} {path} with {text[:80]!r}")
        return found


def service_client(url: str | None, key: str | None) -> ServiceClient:
    """By these or the variables; CallerError that names the one that is missing."""
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise CallerError(f"{URL_VARIABLE} is not set; it is where `vmcell serve` answers")
    for variable in KEY_VARIABLES:
        key = key or os.environ.get(variable)
    if not key:
        names = " or ".join(KEY_VARIABLES)
        raise CallerError(f"{names} is not set; make a key: vmcell key create --team NAME")
    return ServiceClient(url, key)


def _sentence(body: bytes, status: int) -> str:
    try:
        return f"{status}, {json.loads(body)['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}"
