"""A running API, asked by the command line: plain HTTP, errors as sentences.

Where it is and which key it takes come from E2B's own variables: E2B_API_URL, else
`https://api.` before E2B_DOMAIN, else the address of `vmcell serve`; E2B_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from vmcell_protos.errors import CallerError, HostError

DEFAULT_URL = "http://127.0.0.1:3000"
ANSWER_WITHIN_S = 60
MAX_REFUSAL_BYTES = 65536
# Codes of the statuses that callers of this module tell apart.
CODES = {
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    409: "aborted",
    429: "resource_exhausted",
}

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A good answer: `media` is its JSON, None without a body; `next_token` leads to more of it."""

    status: int
    media: object
    next_token: str


class ApiClient:
    """One API and key; each call is a connection of its own.

    Raises CallerError with the API's own sentence for what it refuses, HostError for what it could
    not do and when there is no such API.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key

    def ask(
        self, method: str, path: str, body: object = None, *, within_s: int = ANSWER_WITHIN_S
    ) -> Answer:
        """Sends `body` as JSON; None sends none."""
        headers = {"X-API-Key": self.key}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=within_s) as response:
                text = response.read()
                status, token = response.status, response.headers.get("X-Next-Token", "")
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._silent(error, f"{method} {path}", within_s) from error
        try:
            media = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise self._strange(f"{method} {path} with no JSON") from error
        return Answer(status=status, media=media, next_token=token)

    def ask_object(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        needs: Sequence[str] = (),
        within_s: int = ANSWER_WITHIN_S,
    ) -> Json:
        """The answer, an object that has the keys `needs`."""
        media = self.ask(method, path, body, within_s=within_s).media
        return self.checked(media, f"{method} {path}", needs)

    def ask_list(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        needs: Sequence[str] = (),
        within_s: int = ANSWER_WITHIN_S,
    ) -> list[Json]:
        """The answer, a list of objects that have the keys `needs`."""
        media = self.ask(method, path, body, within_s=within_s).media
        return self.checked_rows(media, f"{method} {path}", needs)

    def pages(self, path: str, query: Mapping[str, str], *, needs: Sequence[str]) -> list[Json]:
        """The rows of all pages of a list; queries with an empty value are left out."""
        rows: list[Json] = []
        token = ""
        while True:
            given = {name: value for name, value in query.items() if value}
            words = urlencode({**given, **({"nextToken": token} if token else {})})
            target = f"{path}?{words}" if words else path
            answer = self.ask("GET", target)
            rows += self.checked_rows(answer.media, f"GET {path}", needs)
            token = answer.next_token
            if not token:
                return rows

    def checked(self, media: object, call: str, needs: Sequence[str]) -> Json:
        """`media` as an object with those keys; HostError when it is none."""
        if not isinstance(media, dict):
            raise self._strange(f"{call} with no object")
        absent = [name for name in needs if name not in media]
        if absent:
            raise self._strange(f"{call} without {', '.join(absent)}")
        return media

    def checked_rows(self, media: object, call: str, needs: Sequence[str]) -> list[Json]:
        """`media` as a list of such objects."""
        if not isinstance(media, list):
            raise self._strange(f"{call} with no list")
        return [self.checked(row, call, needs) for row in media]

    def _silent(self, error: Exception, call: str, within_s: int) -> HostError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return HostError(
                f"the API at {self.url} has not answered {call} within {within_s} s; it may still "
                "carry it out, so look before you ask again",
                code="deadline_exceeded",
            )
        return no_answer(self.url, reason)

    def _refused(self, error: urllib.error.HTTPError) -> CallerError | HostError:
        with error:
            try:
                text = error.read(MAX_REFUSAL_BYTES)
            except (OSError, http.client.HTTPException):
                text = b""
        try:
            words = str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # Another server's 404 does not say that there is no such sandbox, so it gets no code.
            strange = self._strange(f"{error.code} and gives no reason")
            return strange if error.code >= 500 else CallerError(str(strange))
        if error.code >= 500:
            return HostError(words)
        return CallerError(words, code=CODES.get(error.code))

    def _strange(self, what: str) -> HostError:
        """For an answer that vmcell's API does not give."""
        return HostError(
            f"{self.url} answers {what}; see that E2B_API_URL is vmcell's API, of this version"
        )


def client_of_environment() -> ApiClient:
    """The API that the environment names; CallerError without a key, or for what is no URL."""
    key = os.environ.get("E2B_API_KEY", "")
    if not key:
        raise CallerError("E2B_API_KEY is not set; make a key with `vmcell key create --team NAME`")
    if not key.isascii() or not key.isprintable():
        raise CallerError("E2B_API_KEY holds characters that no key has; copy it again")
    url, domain = os.environ.get("E2B_API_URL"), os.environ.get("E2B_DOMAIN")
    if url or not domain:
        return ApiClient(checked_url("E2B_API_URL", url or DEFAULT_URL, like=DEFAULT_URL), key)
    if "/" in domain or not _is_url(f"https://api.{domain}"):
        raise CallerError(f"E2B_DOMAIN is {domain[:80]!r}; set it to a name like sbx.example.com")
    return ApiClient(f"https://api.{domain}", key)


def no_answer(url: str, reason: object) -> HostError:
    """What is said of an API that cannot be reached."""
    return HostError(
        f"the API does not answer at {url}: {reason}; start it with `vmcell serve`, or set "
        "E2B_API_URL"
    )


def checked_url(variable: str, url: str, *, like: str) -> str:
    """`url` without a slash at its end; CallerError when it is not of HTTP."""
    if not _is_url(url):
        raise CallerError(f"{variable} is {url[:80]!r}; set it to a URL like {like}")
    return url.rstrip("/")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_good and text.isascii() and text.isprintable() and " " not in text


def segment(text: str) -> str:
    """An id or name as one segment of a path, slashes and colons encoded; CallerError for what
    can be neither."""
    try:
        word = quote(text, safe="")
    except UnicodeEncodeError:
        word = ""
    if word in ("", ".", ".."):
        raise CallerError(f"{text!r} is neither an id nor a name")
    return word
