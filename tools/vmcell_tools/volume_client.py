"""The volumes of a team, asked of a running API as a client would: E2B_API_URL and E2B_API_KEY."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request

from vmcell_protos.errors import CallerError, HostError

DEFAULT_URL = "http://127.0.0.1:3000"
ANSWER_WITHIN_S = 60
REMOVE_WITHIN_S = 630  # a volume may have millions of files


def checked_url(url: str) -> str:
    """Where an API answers, without a slash at its end; CallerError unless http or https."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise CallerError(f"E2B_API_URL is {url!r}; set it to a URL like {DEFAULT_URL}")
    return url.rstrip("/")


def no_answer(url: str, error: Exception) -> HostError:
    """What is said of an API that cannot be reached."""
    words = getattr(error, "reason", error)  # urllib wraps the system's error
    return HostError(
        f"the API does not answer at {url}: {words}; start it with `vmcell serve`, or set"
        " E2B_API_URL"
    )


class VolumeClient:
    """Every call raises CallerError with the API's own sentence, or HostError without an API."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self._url = checked_url(url or os.environ.get("E2B_API_URL") or DEFAULT_URL)
        self._key = key or os.environ.get("E2B_API_KEY") or ""
        if not self._key:
            raise CallerError("E2B_API_KEY is not set; make a key: vmcell key create --team NAME")

    def list(self) -> list[dict[str, str]]:
        """`volumeID` and `name` of each."""
        found = self._ask("GET", "/volumes")
        assert isinstance(found, list)
        return found

    def create(self, name: str) -> dict[str, str]:
        """`volumeID`, `name` and `token` of a new one."""
        made = self._ask("POST", "/volumes", {"name": name})
        assert isinstance(made, dict)
        return made

    def remove(self, name_or_id: str) -> str:
        """Removes a volume with its files; its id."""
        rows = self.list()
        found = [row for row in rows if name_or_id == row["name"]]
        found = found or [row for row in rows if name_or_id == row["volumeID"]]
        if not found:
            raise CallerError(f"there is no volume {name_or_id!r}; see: vmcell volume list")
        volume_id = found[0]["volumeID"]
        self._ask("DELETE", f"/volumes/{urllib.parse.quote(volume_id)}", within_s=REMOVE_WITHIN_S)
        return volume_id

    def _ask(
        self, method: str, path: str, body: object = None, *, within_s: int = ANSWER_WITHIN_S
    ) -> object:
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-API-KEY": self._key, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=within_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise CallerError(_sentence(error.read(), error.code)) from error
        except (OSError, ValueError) as error:
            raise no_answer(self._url, error) from error
        return json.loads(text) if text else None


def _sentence(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API answered {status}"
