"""What is kept of a request: its id, a line in the log, counts, and an entry in the audit.

Audited is what changes something, and what a known key was refused. Requests without a valid key
are counted and logged, not audited: anybody could fill the table. The entry is written when the
answer is known; a worker that is killed in between leaves none.
"""

from __future__ import annotations

import logging
import secrets
import time

import falcon

from vmcell_api import logs
from vmcell_api.identifiers import sandbox_id_of
from vmcell_api.metrics import Metrics
from vmcell_api.store.audit import Audit, AuditEntry
from vmcell_api.store.records import now_ms
from vmcell_protos.errors import HostError

log = logging.getLogger("vmcell.api.request")

CREATES = ("/sandboxes", "/v2/sandboxes")
READS = ("GET", "HEAD", "OPTIONS")
# Where an answer names what it is about, when the path does not.
TARGET_FIELDS = ("sandboxID", "volumeID", "snapshotID", "templateID", "keyID", "teamID")


class RequestRecord:
    """Falcon middleware; the first, so that it sees what all others answered."""

    def __init__(self, audit: Audit, metrics: Metrics) -> None:
        self._audit = audit
        self._metrics = metrics

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Gives the request an id of ours, which the answer tells."""
        req.context.started_s = time.monotonic()
        req.context.error_code = "ok"
        req.context.request_id = secrets.token_hex(8)
        logs.begin_request(req.context.request_id)
        resp.set_header("X-Request-Id", req.context.request_id)

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict
    ) -> None:
        """Notes what the request is about."""
        req.context.target = "/".join(str(value) for value in params.values())
        sandbox_id = sandbox_id_of(str(params.get("sandbox_id", "")))
        if sandbox_id:
            logs.add_to_request(sandbox_id=sandbox_id)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Keeps it."""
        duration_s = time.monotonic() - req.context.started_s
        route = req.uri_template or ""
        status, code = resp.status_code, req.context.error_code
        target = _target(req, resp)
        details = {
            "method": req.method if req.method in falcon.COMBINED_METHODS else "other",
            "route": route or "none",
            "status": status,
            "duration_ms": round(duration_s * 1000, 1),
        }
        if route in CREATES and target:
            logs.add_to_request(sandbox_id=target)
        log.info("%s", "answered" if code == "ok" else code, extra={"details": details})
        self._metrics.count(
            route=route,
            method=str(details["method"]),
            status=status,
            code=code,
            duration_s=duration_s,
            creates=req.method == "POST" and route in CREATES,
        )
        if _is_audited(req, status):
            self._write(req, status, code, target)
        logs.end_request()

    def _write(self, req: falcon.Request, status: int, code: str, target: str) -> None:
        entry = AuditEntry(
            at_unix_ms=now_ms(),
            request_id=req.context.request_id,
            team_id=req.context.team.team_id,
            actor=f"key {req.context.key_id}",
            action=f"{req.method} {req.uri_template or 'no route'}",
            target=target,
            status=status,
            result=code,
        )
        try:
            self._audit.add(entry)
        except HostError as error:
            log.error("an audit entry was not written: %s", error)


def _is_audited(req: falcon.Request, status: int) -> bool:
    """Not what was over the rate: a loop of one client would push everything else out."""
    known = hasattr(req.context, "key_id") and not hasattr(req.context, "rate_exceeded")
    return known and (req.method not in READS or status in (401, 403))


def _target(req: falcon.Request, resp: falcon.Response) -> str:
    """Ids only: a path that named nothing of ours may hold anything."""
    if isinstance(resp.media, dict):
        for name in TARGET_FIELDS:
            if isinstance(resp.media.get(name), str):
                return logs.without_secrets(resp.media[name])
    target = str(getattr(req.context, "target", ""))
    if resp.status_code in (400, 404, 405):
        return sandbox_id_of(target) or ""
    return logs.without_secrets(target)
