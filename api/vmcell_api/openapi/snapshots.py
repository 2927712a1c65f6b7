"""What needs snapshots: E2B's routes, and cubesandbox's `rollback`. Most of them refuse."""

from __future__ import annotations

from vmcell_api.openapi.operation import (
    FLAG,
    TEXT,
    Json,
    Operation,
    array,
    between,
    record,
    ref,
)
from vmcell_api.sandbox_bodies import MAX_PAGE, NO_END_S
from vmcell_api.snapshot_routes import MOST_FORKS

TAG = "snapshots"

_TIMEOUT = between(0, NO_END_S)

SCHEMAS = {
    "Snapshot": record({"snapshotID": TEXT, "names": array(TEXT)}),
    "PauseSandbox": record({}, {"memory": FLAG, "requireHealthyGuest": FLAG}),
    "ResumeSandbox": record({}, {"timeout": _TIMEOUT, "autoPause": FLAG, "memory": FLAG}),
    "NewSnapshot": record({}, {"name": TEXT, "memory": FLAG}),
    "ForkSandbox": record({}, {"timeout": _TIMEOUT, "count": between(1, MOST_FORKS)}),
    "RollbackSandbox": record({}, {"snapshotID": TEXT}),
}


def _refused(name: str, body: str, *, status: int = 501, why: str = "") -> Operation:
    """A route below a sandbox that no request gets through."""
    body_schema: Json = ref(body)
    return Operation(
        method="POST",
        path=f"/sandboxes/{{sandbox_id}}/{name}",
        summary=f"Refused with {status}: {why or 'vmcell does not have snapshots yet'}.",
        body=body_schema,
        answers={},
        errors=(404, 413, 504, status),
    )


OPERATIONS = (
    Operation(
        method="GET",
        path="/snapshots",
        summary="The snapshots of the team: none yet.",
        query={"sandboxID": TEXT, "name": TEXT, "limit": between(1, MAX_PAGE), "nextToken": TEXT},
        answers={200: array(ref("Snapshot"), maxItems=MAX_PAGE)},
    ),
    _refused("pause", "PauseSandbox"),
    _refused("resume", "ResumeSandbox", status=409, why="every sandbox is running"),
    _refused("snapshots", "NewSnapshot"),
    _refused("fork", "ForkSandbox"),
    _refused("rollback", "RollbackSandbox"),
)
