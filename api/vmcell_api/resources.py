"""The routes: HTTP in, one verb of the control plane, E2B's JSON out.

Status codes are exact: SDKs parse only the ones E2B documents.
"""

from __future__ import annotations

import falcon

from vmcell_api import sandbox_answers
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import ControlPlane, Page
from vmcell_api.json_body import int_field
from vmcell_api.request_body import read_body
from vmcell_api.sandbox_bodies import (
    DEFAULT_TIMEOUT_V2_S,
    MAX_PAGE,
    MAX_REFRESH_S,
    ListQuery,
    encode_cursor,
    parse_create,
    parse_list_query,
    parse_required_timeout,
    parse_timeout,
)
from vmcell_protos.errors import CallerError


class Sandboxes:
    """`/sandboxes` and `/v2/sandboxes`: create and list."""

    def __init__(self, control: ControlPlane, config: ApiConfig) -> None:
        self._control = control
        self._config = config

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Create as SDKs before 2.51 do."""
        self._create(req, resp, version=1)

    def on_post_v2(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Create; always secured."""
        self._create(req, resp, version=2)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """All sandboxes at once, as SDKs up to 1.2 ask for them."""
        query = parse_list_query(req.query_string)
        everything = ListQuery(metadata=query.metadata, limit=MAX_PAGE**3)
        self._write_page(resp, self._control.list(req.context.team, everything))

    def on_get_v2(self, req: falcon.Request, resp: falcon.Response) -> None:
        """One page of sandboxes."""
        page = self._control.list(req.context.team, parse_list_query(req.query_string))
        self._write_page(resp, page)

    def _create(self, req: falcon.Request, resp: falcon.Response, *, version: int) -> None:
        if req.get_header("Idempotency-Key"):
            raise CallerError("this server does not have Idempotency-Key; leave the header out")
        limit_s = self._config.max_timeout_s
        body = parse_create(read_body(req), version=version, max_timeout_s=limit_s)
        record, _ = self._control.create(req.context.team, body)
        resp.status = 201
        resp.media = sandbox_answers.sandbox(record, self._config.domain)

    def _write_page(self, resp: falcon.Response, page: Page) -> None:
        resp.media = [sandbox_answers.listed(*pair) for pair in page.entries]
        resp.set_header("X-Total-Running", str(page.running_count))
        if page.following is not None:
            record, running = page.following
            token = encode_cursor(running.started_at_unix_ms, record.sandbox_id)
            resp.set_header("X-Next-Token", token)


class Sandbox:
    """`/sandboxes/{sandbox_id}` and what hangs below it."""

    def __init__(self, control: ControlPlane, config: ApiConfig) -> None:
        self._control = control
        self._config = config

    def on_get(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Details."""
        record, running = self._control.get(req.context.team, sandbox_id)
        resp.media = sandbox_answers.detail(record, running, self._config.domain)

    def on_delete(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Kill."""
        self._control.kill(req.context.team, sandbox_id)
        resp.status = 204

    def on_post_timeout(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Sets the time that is left; 0 ends the sandbox."""
        timeout_s = parse_required_timeout(read_body(req), self._config.max_timeout_s)
        self._control.set_timeout(req.context.team, sandbox_id, timeout_s)
        resp.status = 204

    def on_post_connect(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Answers the sandbox and extends its time, never shortens it; 200: it was running."""
        limit_s = self._config.max_timeout_s
        timeout_s = parse_timeout(
            read_body(req), default=DEFAULT_TIMEOUT_V2_S, max_timeout_s=limit_s
        )
        record, _ = self._control.set_timeout(
            req.context.team, sandbox_id, timeout_s, only_extend=True
        )
        resp.media = sandbox_answers.sandbox(record, self._config.domain)

    def on_post_refreshes(
        self, req: falcon.Request, resp: falcon.Response, sandbox_id: str
    ) -> None:
        """Extends the time, as SDKs 1.x do."""
        bounds = range(MAX_REFRESH_S + 1)
        duration_s = int_field(read_body(req), "duration", default=0, bounds=bounds)
        self._control.set_timeout(req.context.team, sandbox_id, duration_s, only_extend=True)
        resp.status = 204


class Health:
    """`GET /health`."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Says that the API answers; cubesandbox clients want a JSON body."""
        resp.media = {"status": "ok"}
