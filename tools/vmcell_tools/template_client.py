"""The API's template routes for the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from vmcell_tools.api_client import ApiClient, Json, segment

POLL_S = 0.5
PAGE = 100
LISTED = (
    *("templateID", "names", "public", "buildStatus"),
    *("cpuCount", "memoryMB", "spawnCount"),
)


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
    """Every call raises what `ApiClient` does."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    def templates(self) -> list[Json]:
        """The team's templates and the installation's, as E2B's JSON."""
        return self._api.ask_list("GET", "/templates", needs=LISTED)

    def builds(self, template: str) -> tuple[str, list[Json]]:
        """(template id, its builds, the newest first); raises CallerError for an unknown name."""
        path = f"/templates/{segment(template)}"
        found = self._api.ask_object("GET", path, needs=("templateID", "builds"))
        return str(found["templateID"]), list(found["builds"])

    def remove(self, template: str) -> None:
        """Deletes a template; builds that run are cancelled."""
        self._api.ask("DELETE", f"/templates/{segment(template)}")

    def follow(self, template_id: str, build_id: str) -> Iterator[LogLine | BuildEnd]:
        """The lines of a build's log as they come, and last how it ended."""
        offset = 0
        path = f"/templates/{segment(template_id)}/builds/{segment(build_id)}/status"
        while True:
            state = self._api.ask_object(
                "GET", f"{path}?logsOffset={offset}&limit={PAGE}", needs=("logEntries", "status")
            )
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
