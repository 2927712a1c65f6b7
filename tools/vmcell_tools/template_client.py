"""The API's template routes for the command line: plain HTTP, errors as sentences.

Where the API is and which key it takes come from E2B's own variables, E2B_API_URL and E2B_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.volume_client import DEFAULT_URL, checked_url, no_answer

TIMEOUT_S = 60
POLL_S = 0.5
PAGE = 100


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A line of a build's log."""

    level: str
    message: str
    step: str


@dataclass(frozen=True, kw_only=True)
class BuildEnd:
    """How a build ended: ready or error, and then why."""

    status: str
    reason: str = ""
    step: str = ""


class TemplateClient:
    """One API and key; each call is a connection of its own."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key

    def templates(self) -> list[dict[str, object]]:
        """The team's templates and the installation's, as E2B's JSON."""
        found = self._ask("GET", "/templates")
        if not isinstance(found, list):
            raise HostError(f"{self.url} answered GET /templates with no list; is it an E2B API?")
        return found

    def builds(self, template: str) -> tuple[str, list[dict[str, object]]]:
        """(template id, its builds, the newest first); raises CallerError for an unknown name."""
        found = self._ask("GET", f"/templates/{_segment(template)}")
        if not isinstance(found, dict):
            raise HostError(f"{self.url} answered with no object; is it an E2B API?")
        return str(found["templateID"]), list(found["builds"])

    def remove(self, template: str) -> None:
        """Deletes a template; builds that run are cancelled."""
        self._ask("DELETE", f"/templates/{_segment(template)}")

    def follow(self, template_id: str, build_id: str) -> Iterator[LogLine | BuildEnd]:
        """The lines of a build's log as they come, and last how it ended."""
        offset = 0
        while True:
            path = f"/templates/{_segment(template_id)}/builds/{_segment(build_id)}/status"
            state = self._ask("GET", f"{path}?logsOffset={offset}&limit={PAGE}")
            if not isinstance(state, dict):
                raise HostError(f"{self.url} answered with no object; is it an E2B API?")
            for row in state["logEntries"]:
                yield LogLine(level=row["level"], message=row["message"], step=row.get("step", ""))
            offset += len(state["logEntries"])
            if state["logEntries"]:
                continue
            if state["status"] in ("ready", "error"):
                reason = state.get("reason") or {}
                yield BuildEnd(
                    status=state["status"],
                    reason=reason.get("message", ""),
                    step=reason.get("step", ""),
                )
                return
            time.sleep(POLL_S)

    def _ask(self, method: str, path: str) -> object:
        request = urllib.request.Request(
            f"{self.url}{path}", method=method, headers={"X-API-Key": self.key}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise _refused(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise no_answer(self.url, error) from error
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise HostError(f"{self.url} answered {method} {path} with no JSON") from error


def client_of_environment() -> TemplateClient:
    """The API that E2B_API_URL and E2B_API_KEY name; raises CallerError without a key."""
    key = os.environ.get("E2B_API_KEY", "")
    if not key:
        raise CallerError("E2B_API_KEY is not set; make a key with `vmcell key create --team NAME`")
    return TemplateClient(checked_url(os.environ.get("E2B_API_URL") or DEFAULT_URL), key)


def _refused(error: urllib.error.HTTPError) -> CallerError | HostError:
    with error:
        text = error.read(65536)
    try:
        words = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        words = f"the API answered {error.code}"
    return CallerError(words) if error.code < 500 else HostError(words)


def _segment(text: str) -> str:
    """A name as one segment of a path, slashes and colons encoded."""
    return quote(text, safe="")
