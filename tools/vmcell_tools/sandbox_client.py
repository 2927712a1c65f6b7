"""The API's sandbox routes for the command line: E2B's, and the extensions under `/vmcell/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote, urlencode

from vmcell_protos.errors import CallerError
from vmcell_tools.api_client import Answer, ApiClient, Json

# A microVM may have to boot, or gigabytes to be written.
SLOW_WITHIN_S = 300
LISTED = (
    *("sandboxID", "templateID", "state", "startedAt", "endAt"),
    *("cpuCount", "memoryMB", "diskSizeMB", "metadata"),
)
HISTORY = (
    *("snapshotID", "names", "parent", "isUndoPoint", "createdAt", "expiresAt"),
    *("bytes", "allocatedBytes"),
)
# E2B's older clients write `<sandbox id>-<client id>`.
_ID = re.compile(r"[A-Za-z0-9-]{1,80}")


class SandboxClient:
    """Every call raises what `ApiClient` does; for an unknown sandbox it says where to look."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    def find(self, *, state: str, metadata: Mapping[str, str], template: str) -> list[Json]:
        """The sandboxes that match, newest first; "" and {} match all."""
        query = {"state": state, "metadata": metadata_query(metadata), "template": template}
        return self._api.pages("/v2/sandboxes", query, needs=LISTED)

    def get(self, sandbox_id: str) -> Json:
        """E2B's SandboxDetail."""
        answer = self._ask("GET", f"/sandboxes/{sandbox_segment(sandbox_id)}")
        return self._api.checked(answer.media, "GET /sandboxes/ID", LISTED)

    def newest_metrics(self, sandbox_id: str) -> Json | None:
        """The newest sample of what it uses, None when there is none yet."""
        path = f"/sandboxes/metrics?{urlencode({'sandbox_ids': sandbox_id})}"
        found = self._api.ask_object("GET", path, needs=("sandboxes",))
        rows = list(found["sandboxes"].values())
        return rows[0] if rows else None

    def create(self, body: Json) -> Json:
        """`body` in E2B's words (NewSandbox)."""
        return self._api.ask_object(
            "POST", "/v2/sandboxes", body, needs=("sandboxID",), within_s=SLOW_WITHIN_S
        )

    def kill(self, sandbox_id: str) -> None:
        self._ask("DELETE", f"/sandboxes/{sandbox_segment(sandbox_id)}")

    def pause(self, sandbox_id: str) -> None:
        self._ask("POST", f"/sandboxes/{sandbox_segment(sandbox_id)}/pause", {})

    def resume(self, sandbox_id: str, timeout_s: int | None) -> bool:
        """Whether it was paused before; a running one's time is extended."""
        body = {} if timeout_s is None else {"timeout": timeout_s}
        answer = self._ask("POST", f"/v2/sandboxes/{sandbox_segment(sandbox_id)}/connect", body)
        return answer.status == 201

    def set_timeout(self, sandbox_id: str, timeout_s: int) -> None:
        """Its end is `timeout_s` from now; 0 ends or pauses it at once."""
        path = f"/sandboxes/{sandbox_segment(sandbox_id)}/timeout"
        self._ask("POST", path, {"timeout": timeout_s})

    def logs(self, sandbox_id: str, *, level: str, search: str, limit: int) -> list[Json]:
        """The newest `limit` entries from `level` on, oldest first."""
        query = {"direction": "backward", "level": level, "search": search, "limit": str(limit)}
        path = f"/v2/sandboxes/{sandbox_segment(sandbox_id)}/logs?{urlencode(query)}"
        found = self._api.checked(self._ask("GET", path).media, "GET …/logs", ("logs",))
        needs = ("timestamp", "level", "message", "fields")
        return self._api.checked_rows(found["logs"], "GET …/logs", needs)[::-1]

    def memory(self, sandbox_id: str) -> Json:
        """What its processes have of the host's memory, by process, guest RAM apart."""
        answer = self._ask("GET", f"{_extension(sandbox_id)}/memory")
        needs = ("guestMemoryBytes", "processes")
        return self._api.checked(answer.media, "GET …/memory", needs)

    def history(self, sandbox_id: str) -> list[Json]:
        """Its snapshots and undo points, oldest first."""
        answer = self._ask("GET", f"{_extension(sandbox_id)}/snapshots")
        return self._api.checked_rows(answer.media, "GET …/snapshots", HISTORY)

    def rollback(self, sandbox_id: str, snapshot: str) -> Json:
        """The sandbox, with the snapshot that undoes this under `undo`."""
        answer = self._ask(
            "POST", f"{_extension(sandbox_id)}/rollback", {"snapshotID": snapshot}, slow=True
        )
        return self._api.checked(answer.media, "POST …/rollback", ("sandboxID", "undo"))

    def undo(self, sandbox_id: str) -> Json:
        """The same for taking back the last rollback, or undo."""
        answer = self._ask("POST", f"{_extension(sandbox_id)}/undo", {}, slow=True)
        return self._api.checked(answer.media, "POST …/undo", ("sandboxID", "undo"))

    def fork(self, sandbox_id: str, *, count: int, timeout_s: int) -> list[Json]:
        """For each copy an object with `sandbox`, or with `error`."""
        body = {"count": count, "timeout": timeout_s}
        answer = self._ask("POST", f"{_extension(sandbox_id)}/fork", body, slow=True)
        return self._api.checked_rows(answer.media, "POST …/fork", ())

    def _ask(self, method: str, path: str, body: object = None, *, slow: bool = False) -> Answer:
        try:
            if method == "GET" and not slow:
                return self._api.ask(method, path, body)
            return self._api.ask(method, path, body, within_s=SLOW_WITHIN_S)
        except CallerError as error:
            raise with_next_step(error) from error


def with_next_step(error: CallerError) -> CallerError:
    """The error of a call about one sandbox, with where the right ids stand."""
    words = str(error)
    if error.code != "not_found" or "vmcell " in words:
        return error
    place = "sandbox history ID" if words.startswith("snapshot ") else "sandbox list"
    return CallerError(f"{words}; see: vmcell {place}", code=error.code)


def sandbox_segment(text: str) -> str:
    """A sandbox's id as one segment of a path; CallerError for what can be none."""
    if not _ID.fullmatch(text):
        raise CallerError(f"{text[:80]!r} is no sandbox id; see: vmcell sandbox list")
    return text


def metadata_query(metadata: Mapping[str, str]) -> str:
    """The value of the parameter `metadata`, before the parameter itself is quoted (E2B's form)."""
    quoted = {quote(name, safe=""): quote(value, safe="") for name, value in metadata.items()}
    return urlencode(quoted)


def _extension(sandbox_id: str) -> str:
    return f"/vmcell/sandboxes/{sandbox_segment(sandbox_id)}"
