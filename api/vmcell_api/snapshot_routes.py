"""The routes that need snapshots: E2B's, cubesandbox's `rollback`, and the extensions.

What E2B has and vmcell has not is refused by name: a snapshot of files alone (`memory: false`).
"""

from __future__ import annotations

import re

import falcon

from vmcell_api import sandbox_answers, snapshot_answers
from vmcell_api.access import timeout_limit_s
from vmcell_api.config import ApiConfig
from vmcell_api.identifiers import sandbox_id_of
from vmcell_api.json_body import bool_field, int_field, request_json, text_field
from vmcell_api.page_cursor import decode_cursor, encode_cursor
from vmcell_api.sandbox_bodies import (
    DEFAULT_TIMEOUT_V1_S,
    DEFAULT_TIMEOUT_V2_S,
    parse_page_size,
    parse_timeout,
)
from vmcell_api.snapshot_plane import SnapshotPlane
from vmcell_protos.errors import CallerError

MOST_FORKS = 20
MAX_NAME_LENGTH = 260
_ROW_ID = re.compile(r"snap-[a-z0-9]{20}")


class Snapshots:
    """`/snapshots` and what hangs below a sandbox; see the module."""

    def __init__(self, plane: SnapshotPlane, config: ApiConfig) -> None:
        self._plane = plane
        self._config = config

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A page of the team's snapshots, newest first."""
        limit = parse_page_size(req.get_param("limit") or "")
        token = req.get_param("nextToken") or ""
        after = decode_cursor(token, _ROW_ID) if token else None
        sandbox = req.get_param("sandboxID") or ""
        name = req.get_param("name") or ""
        # An id that is none has no snapshots either.
        sandbox_id = (sandbox_id_of(sandbox) or sandbox) if sandbox else ""
        rows = self._plane.list(req.context.team, sandbox_id=sandbox_id, name=name)
        if after is not None:
            rows = [row for row in rows if (row.created_at_unix_ms, row.snapshot_id) < after]
        page = rows[:limit]
        resp.media = [snapshot_answers.listed(row) for row in page]
        if len(rows) > len(page):
            last = page[-1]
            token = encode_cursor(last.created_at_unix_ms, last.snapshot_id)
            resp.set_header("X-Next-Token", token)

    def on_post_pause(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Pauses; 409: it is paused already, or a request called the pause off."""
        body = request_json(req)
        must_be_healthy = bool_field(body, "requireHealthyGuest", default=False)
        _refuse_files_alone(body)
        self._plane.pause(req.context.team, sandbox_id, must_be_healthy=must_be_healthy)
        resp.status = 204

    def on_post_connect(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Answers the sandbox and extends its time; 201: it was paused, 200: it was running."""
        body = request_json(req)
        _refuse_files_alone(body)
        timeout_s = self._timeout_s(req, body, DEFAULT_TIMEOUT_V2_S)
        pair, resumed = self._plane.connect(req.context.team, sandbox_id, timeout_s)
        resp.status = 201 if resumed else 200
        resp.media = sandbox_answers.sandbox(pair[0], self._config.domain)

    def on_post_resume(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Resumes, as SDKs 2.0 to 2.5 do; 409: it is running already."""
        body = request_json(req)
        _refuse_files_alone(body)
        timeout_s = self._timeout_s(req, body, DEFAULT_TIMEOUT_V1_S)
        record, _ = self._plane.resume(req.context.team, sandbox_id, timeout_s)
        resp.status = 201
        resp.media = sandbox_answers.sandbox(record, self._config.domain)

    def on_post_snapshots(
        self, req: falcon.Request, resp: falcon.Response, sandbox_id: str
    ) -> None:
        """Makes a snapshot; the sandbox goes on."""
        body = request_json(req)
        _refuse_files_alone(body)
        has_name = body.get("name") not in (None, "")
        name = text_field(body, "name", max_length=MAX_NAME_LENGTH) if has_name else ""
        row = self._plane.make(req.context.team, sandbox_id, name)
        resp.status = 201
        resp.media = snapshot_answers.listed(row)

    def on_post_fork(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Makes copies; each entry of the answer is a sandbox or an error."""
        body = request_json(req)
        count = int_field(body, "count", default=1, bounds=range(1, MOST_FORKS + 1))
        timeout_s = self._timeout_s(req, body, DEFAULT_TIMEOUT_V1_S, lowest=1)
        forks = self._plane.fork(req.context.team, sandbox_id, count=count, timeout_s=timeout_s)
        resp.status = 201
        resp.media = [snapshot_answers.forked(row, self._config.domain) for row in forks]

    def on_post_rollback(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Back to a snapshot of the sandbox; the answer names what undoes that."""
        name = text_field(request_json(req), "snapshotID", max_length=MAX_NAME_LENGTH)
        (record, _), undo = self._plane.rollback(req.context.team, sandbox_id, name)
        answer = sandbox_answers.sandbox(record, self._config.domain)
        resp.media = {**answer, "undo": snapshot_answers.history_row(undo, "")}

    def on_post_undo(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Back to what was before the last rollback, or undo."""
        request_json(req)
        (record, _), undo = self._plane.undo(req.context.team, sandbox_id)
        answer = sandbox_answers.sandbox(record, self._config.domain)
        resp.media = {**answer, "undo": snapshot_answers.history_row(undo, "")}

    def on_get_history(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """The snapshots of a sandbox with parents and sizes, oldest first."""
        rows = self._plane.history(req.context.team, sandbox_id)
        resp.media = [snapshot_answers.history_row(row, name) for row, name in rows]

    def on_get_diff(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Which parts of two snapshots of a sandbox differ; `files=true`: which files of it."""
        older, newer = (req.get_param(name) or "" for name in ("older", "newer"))
        if not older or not newer:
            raise CallerError("older and newer are needed; give the ids of two snapshots")
        wish = req.get_param("files") or "false"
        if wish not in ("true", "false"):
            raise CallerError(f"files is {wish[:40]!r}; it takes true or false")
        found = self._plane.difference(
            req.context.team, sandbox_id, older, newer, by_file=wish == "true"
        )
        resp.media = snapshot_answers.difference(found)

    def on_get_memory(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """What the sandbox has of the host's memory, guest RAM apart from the two processes."""
        resp.media = self._plane.memory(req.context.team, sandbox_id)

    def _timeout_s(
        self, req: falcon.Request, body: dict[str, object], default_s: int, *, lowest: int = 0
    ) -> int:
        limit_s = timeout_limit_s(req.context.team, self._config)
        return parse_timeout(body, default=default_s, max_timeout_s=limit_s, lowest=lowest)


def _refuse_files_alone(body: dict[str, object]) -> None:
    if not bool_field(body, "memory", default=True):
        raise CallerError(
            "memory is false, but this server does not have pauses and snapshots of files alone: "
            "it saves and restores memory and files together; leave it out"
        )


def add_snapshot_routes(app: falcon.App, plane: SnapshotPlane, config: ApiConfig) -> None:
    """Adds them to `app`."""
    snapshots = Snapshots(plane, config)
    app.add_route("/snapshots", snapshots)
    for name in ("pause", "connect", "resume", "snapshots", "rollback", "fork"):
        app.add_route(f"/sandboxes/{{sandbox_id}}/{name}", snapshots, suffix=name)
    app.add_route("/v2/sandboxes/{sandbox_id}/connect", snapshots, suffix="connect")
    extension = "/vmcell/sandboxes/{sandbox_id}"
    for name in ("fork", "rollback", "undo", "diff", "memory"):
        app.add_route(f"{extension}/{name}", snapshots, suffix=name)
    app.add_route(f"{extension}/snapshots", snapshots, suffix="history")
