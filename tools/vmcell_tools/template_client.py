"""The API's template routes for the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vmcell_tools.api_client import Api, api_of_environment

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

    def __init__(self, api: Api) -> None:
        self.api = api

    def templates(self) -> list[dict[str, object]]:
        """The team's templates and the installation's, as E2B's JSON."""
        return self.api.rows("/templates", "templateID", "names", "buildStatus")

    def builds(self, template: str) -> tuple[str, list[dict[str, object]]]:
        """(template id, its builds, the newest first); raises CallerError for an unknown name."""
        path = f"/templates/{_segment(template)}"
        found = self._object(path, "templateID", "builds")
        return str(found["templateID"]), list(found["builds"])

    def remove(self, template: str) -> None:
        """Deletes a template; builds that run are cancelled."""
        self.api.ask("DELETE", f"/templates/{_segment(template)}")

    def follow(self, template_id: str, build_id: str) -> Iterator[LogLine | BuildEnd]:
        """The lines of a build's log as they come, and last how it ended."""
        offset = 0
        while True:
            path = f"/templates/{_segment(template_id)}/builds/{_segment(build_id)}/status"
            asked = f"{path}?logsOffset={offset}&limit={PAGE}"
            state = self._object(asked, "logEntries", "status")
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

    def _object(self, path: str, *keys: str) -> dict[str, Any]:
        found = self.api.ask("GET", path)
        if not isinstance(found, dict) or not found.keys() >= {*keys}:
            raise self.api.strange(f"GET {path}")
        return found


def client_of_environment() -> TemplateClient:
    """The API that E2B_API_URL and E2B_API_KEY name; raises CallerError without a key."""
    return TemplateClient(api_of_environment())


def _segment(text: str) -> str:
    """A name as one segment of a path, slashes and colons encoded."""
    return quote(text, safe="")
