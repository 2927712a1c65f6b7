"""One request to a running API, for the commands that go through it: errors come as sentences.

Where the API is and which key it takes come from E2B's own variables, E2B_API_URL and E2B_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from vmcell_protos.errors import CallerError, HostError

DEFAULT_URL = "http://127.0.0.1:3000"
ANSWER_WITHIN_S = 60
_MOST_WORDS = 65536


class Api(NamedTuple):
    """`url` without a slash at its end."""

    url: str
    key: str

    def ask(
        self, method: str, path: str, body: object = None, *, within_s: float = ANSWER_WITHIN_S
    ) -> object:
        """The JSON of the answer, None for an empty one; each call is a connection of its own.

        Raises CallerError with the API's own sentence for a refusal, HostError for its faults,
        without an answer, and for one that is no JSON.
        """
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-API-Key": self.key, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=within_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise no_answer(self.url, error) from error
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise self.strange(f"{method} {path}") from error

    def rows(self, path: str, *keys: str) -> list[dict[str, object]]:
        """`GET path`: a list of objects which all have these keys. Raises as `ask`."""
        found = self.ask("GET", path)
        if not isinstance(found, list) or not all(
            isinstance(row, dict) and row.keys() >= {*keys} for row in found
        ):
            raise self.strange(f"GET {path}")
        return found

    def strange(self, asked: str) -> HostError:
        """For an answer that E2B's API does not give."""
        return HostError(
            f"{self.url} answers {asked} as no E2B API does; set E2B_API_URL to vmcell's API"
        )

    def _refused(self, error: urllib.error.HTTPError) -> CallerError | HostError:
        with error:
            text = error.read(_MOST_WORDS)
        try:
            words = str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            words = (
                f"{self.url} answers {error.code} and gives no reason; see that E2B_API_URL is"
                " vmcell's API"
            )
        return CallerError(words) if error.code < 500 else HostError(words)


def api_of_environment() -> Api:
    """What the variables name; CallerError without a key, and for a URL that is none."""
    key = os.environ.get("E2B_API_KEY")
    if not key:
        raise CallerError("E2B_API_KEY is not set; make a key with `vmcell key create --team NAME`")
    return Api(_checked_url(os.environ.get("E2B_API_URL") or DEFAULT_URL), key)


def no_answer(url: str, error: Exception) -> HostError:
    """What is said of an API that cannot be reached."""
    words = getattr(error, "reason", error)  # urllib wraps the system's error
    return HostError(
        f"the API does not answer at {url}: {words}; start it with `vmcell serve`, or set"
        " E2B_API_URL"
    )


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise CallerError(f"E2B_API_URL is {url!r}; set it to a URL like {DEFAULT_URL}")
    return url.rstrip("/")
