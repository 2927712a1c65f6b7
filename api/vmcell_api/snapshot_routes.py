"""The routes that need snapshots, which vmcell does not have yet: each refuses by name.

An unknown sandbox is 404 first, as it will be later. `resume` of a running sandbox is E2B's 409,
and every sandbox runs; a list of snapshots is an empty page.
"""

from __future__ import annotations

import falcon

from vmcell_api.control_plane import ControlPlane
from vmcell_api.json_body import bool_field, int_field, request_json
from vmcell_api.sandbox_bodies import parse_page_size
from vmcell_protos.errors import CallerError

MOST_FORKS = 20


class Snapshots:
    """`/snapshots` and what hangs below a sandbox; see the module."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The snapshots of the team: none."""
        parse_page_size(req.get_param("limit") or "")
        if req.get_param("nextToken"):
            raise CallerError("nextToken is none of this server's; start again without it")
        resp.media = []

    def on_post_pause(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Refused: 501."""
        body = request_json(req)
        bool_field(body, "memory", default=True)
        bool_field(body, "requireHealthyGuest", default=False)
        self._refuse(req, sandbox_id, "pause")

    def on_post_resume(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Refused: 409, it is running already."""
        request_json(req)
        self._control.get(req.context.team, sandbox_id)
        raise CallerError(f"sandbox {sandbox_id[:60]} is running already", code="aborted")

    def on_post_snapshots(
        self, req: falcon.Request, resp: falcon.Response, sandbox_id: str
    ) -> None:
        """Refused: 501."""
        request_json(req)
        self._refuse(req, sandbox_id, "snapshots")

    def on_post_rollback(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Refused: 501 (cubesandbox only)."""
        request_json(req)
        self._refuse(req, sandbox_id, "rollback")

    def on_post_fork(self, req: falcon.Request, resp: falcon.Response, sandbox_id: str) -> None:
        """Refused: 501."""
        int_field(request_json(req), "count", default=1, bounds=range(1, MOST_FORKS + 1))
        self._refuse(req, sandbox_id, "fork")

    def _refuse(self, req: falcon.Request, sandbox_id: str, what: str) -> None:
        self._control.get(req.context.team, sandbox_id)
        raise CallerError(
            f"this server does not have {what}: it needs snapshots of a running machine, "
            "which vmcell does not have yet; keep what you need in files, or extend the timeout",
            code="unimplemented",
        )


def add_snapshot_routes(app: falcon.App, control: ControlPlane) -> None:
    """Adds them to `app`."""
    snapshots = Snapshots(control)
    app.add_route("/snapshots", snapshots)
    for name in ("pause", "resume", "snapshots", "rollback", "fork"):
        app.add_route(f"/sandboxes/{{sandbox_id}}/{name}", snapshots, suffix=name)
