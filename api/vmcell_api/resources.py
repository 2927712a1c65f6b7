"""The routes: HTTP in, one verb of the control plane, E2B's JSON out.

Status codes are exact: SDKs parse only the ones E2B documents.
"""

from __future__ import annotations

import falcon

from vmcell_api import sandbox_answers
from vmcell_api.access import timeout_limit_s
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import ControlPlane, Page
from vmcell_api.create_once import CreateOnce, parse_idempotency
from vmcell_api.json_body import int_field, request_json
from vmcell_api.network_rules import parse_network_update
from vmcell_api.page_cursor import encode_cursor
from vmcell_api.sandbox_bodies import (
    MAX_PAGE,
    MAX_REFRESH_S,
    ListQuery,
    parse_create,
    parse_list_query,
    parse_required_timeout,
)


class Sandboxes:
    """`/sandboxes` and `/v2/sandboxes`: create and list."""

    def __init__(self, control: ControlPlane, once: CreateOnce, config: ApiConfig) -> None:
        self._control = control
        self._once = once
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
        team, sent = req.context.team, request_json(req)
        body = parse_create(
            sent,
            version=version,
            max_timeout_s=timeout_limit_s(team, self._config),
            allow_no_end=self._config.allow_no_end,
        )
        wish = parse_idempotency(req.get_header("Idempotency-Key"), sent, version)
        if wish is None:
            record, _ = self._control.create(team, body)
        else:
            record, _ = self._once.create(team, body, wish)
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
    """`/sandboxes/{sandbox_id}` and what hangs below it without snapshots."""

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
        """Sets the time that is left; 0 ends or pauses the sandbox at once."""
        limit_s = timeout_limit_s(req.context.team, self._config)
        timeout_s = parse_required_timeout(request_json(req), limit_s)
        self._control.set_timeout(req.context.team, sandbox_id, timeout_s)
        resp.status = 204

    def on_post_refreshes(
        self, req: falcon.Request, resp: falcon.Response, sandbox_id: str
    ) -> None:
        """Extends the time, as SDKs 1.x do."""
        limit_s = timeout_limit_s(req.context.team, self._config)
        bounds = range(min(MAX_REFRESH_S, limit_s) + 1)
        duration_s = int_field(request_json(req), "duration", default=0, bounds=bounds)
        self._control.set_timeout(req.context.team, sandbox_id, duration_s, only_extend=True)
        resp.status = 204

    def on_put_network(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Replaces what the sandbox may reach; in force when it answers."""
        egress = parse_network_update(request_json(req))
        self._control.set_egress(req.context.team, sandbox_id, egress)
        resp.status = 204


class Health:
    """`GET /health`."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Says that the API answers; cubesandbox clients want a JSON body."""
        resp.media = {"status": "ok"}
