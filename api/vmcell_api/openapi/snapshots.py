"""What needs snapshots: E2B's routes, cubesandbox's `rollback`, and the extensions."""

from __future__ import annotations

from vmcell_api.openapi.operation import (
    FLAG,
    MOMENT,
    TEXT,
    WHOLE,
    Json,
    Operation,
    array,
    between,
    nullable,
    one_of,
    record,
    ref,
)
from vmcell_api.sandbox_bodies import MAX_PAGE, NO_END_S
from vmcell_api.snapshot_routes import MAX_NAME_LENGTH, MOST_FORKS

TAG = "snapshots"

_TIMEOUT = between(0, NO_END_S)
_MEMORY = {**FLAG, "description": "false is refused: memory and files are saved together."}
_BYTES = {**WHOLE, "description": "Bytes."}
_ID = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH}
_HISTORY = {
    "snapshotID": TEXT,
    "names": array(TEXT),
    "parent": nullable(TEXT),
    "isUndoPoint": FLAG,
    "createdAt": MOMENT,
    "expiresAt": nullable(MOMENT),
    "cpuCount": WHOLE,
    "memoryMB": WHOLE,
    "bytes": _BYTES,
    "allocatedBytes": {**_BYTES, "description": "On disk, what it shares with others included."},
}
_SUM = {
    f"{name}Bytes": WHOLE
    for name in (
        *("rss", "pss", "sharedClean", "sharedDirty", "privateClean", "privateDirty"),
        "swap",
    )
}

SCHEMAS = {
    "Snapshot": record({"snapshotID": TEXT, "names": array(TEXT)}),
    "SandboxSnapshot": record(_HISTORY),
    "PauseSandbox": record({}, {"memory": _MEMORY, "requireHealthyGuest": FLAG}),
    "ConnectSandbox": record({}, {"timeout": _TIMEOUT, "memory": _MEMORY}),
    "ResumeSandbox": record({}, {"timeout": _TIMEOUT, "autoPause": FLAG, "memory": _MEMORY}),
    "NewSnapshot": record(
        {}, {"name": {"type": "string", "maxLength": MAX_NAME_LENGTH}, "memory": _MEMORY}
    ),
    "ForkSandbox": record({}, {"timeout": between(1, NO_END_S), "count": between(1, MOST_FORKS)}),
    "ForkedSandbox": record(
        {}, {"sandbox": ref("Sandbox"), "error": record({"code": WHOLE, "message": TEXT})}
    ),
    "RollbackSandbox": record({"snapshotID": _ID}),
    "RolledBackSandbox": {
        "allOf": [ref("Sandbox"), record({"undo": ref("SandboxSnapshot")})],
    },
    "SnapshotDifference": record(
        {
            "older": TEXT,
            "newer": TEXT,
            "changed": array(TEXT),
            "unchanged": array(TEXT),
            "allocatedBytesOlder": _BYTES,
            "allocatedBytesNewer": _BYTES,
        },
        {
            "files": array(
                record(
                    {
                        "path": TEXT,
                        "change": one_of("added", "removed", "modified"),
                        "sizeBefore": _BYTES,
                        "sizeAfter": _BYTES,
                    }
                )
            )
        },
    ),
    "SandboxMemory": record(
        {
            "guestMemoryBytes": {**WHOLE, "description": "What the guest believes it has."},
            "processes": array(
                record(
                    {
                        "name": one_of("shim", "vmm"),
                        "pid": WHOLE,
                        "own": {**record(_SUM), "description": "Without guest RAM."},
                        "guestRam": record(_SUM),
                    }
                )
            ),
        }
    ),
}


def _connect(path: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        summary="Resumes a paused sandbox (201), or extends a running one's time (200).",
        body=ref("ConnectSandbox"),
        answers={200: ref("Sandbox"), 201: ref("Sandbox")},
        errors=(404, 409, 413, 504),
    )


def _fork(path: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        summary="Copies a running sandbox; each entry is one of sandbox and error.",
        body=ref("ForkSandbox"),
        answers={201: array(ref("ForkedSandbox"), maxItems=MOST_FORKS)},
        errors=(404, 409, 413, 504),
    )


def _rollback(path: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        summary="Takes a sandbox back to one of its snapshots; what it was before can be undone.",
        body=ref("RollbackSandbox"),
        body_required=True,
        answers={200: ref("RolledBackSandbox")},
        errors=(404, 409, 413, 504),
    )


def _of_sandbox(name: str, summary: str, schema: Json) -> Operation:
    return Operation(
        method="GET",
        path=f"/vmcell/sandboxes/{{sandbox_id}}/{name}",
        summary=summary,
        answers={200: schema},
        errors=(404, 409, 504),
    )


OPERATIONS = (
    Operation(
        method="GET",
        path="/snapshots",
        summary="One page of the team's snapshots, newest first; X-Next-Token: more follow.",
        query={"sandboxID": TEXT, "name": TEXT, "limit": between(1, MAX_PAGE), "nextToken": TEXT},
        answers={200: array(ref("Snapshot"), maxItems=MAX_PAGE)},
        answer_headers=("X-Next-Token",),
        errors=(504,),
    ),
    Operation(
        method="POST",
        path="/sandboxes/{sandbox_id}/pause",
        summary="Saves a sandbox and frees its place; 409: it is paused, or was called off.",
        body=ref("PauseSandbox"),
        answers={204: None},
        errors=(404, 409, 413, 504),
    ),
    _connect("/sandboxes/{sandbox_id}/connect"),
    _connect("/v2/sandboxes/{sandbox_id}/connect"),
    Operation(
        method="POST",
        path="/sandboxes/{sandbox_id}/resume",
        summary="Resumes a paused sandbox, as SDKs 2.0 to 2.5 do; 409: it is running.",
        body=ref("ResumeSandbox"),
        answers={201: ref("Sandbox")},
        errors=(404, 409, 413, 504),
    ),
    Operation(
        method="POST",
        path="/sandboxes/{sandbox_id}/snapshots",
        summary="Makes a snapshot of a running sandbox, which goes on.",
        body=ref("NewSnapshot"),
        answers={201: ref("Snapshot")},
        errors=(404, 409, 413, 504),
    ),
    _fork("/sandboxes/{sandbox_id}/fork"),
    _fork("/vmcell/sandboxes/{sandbox_id}/fork"),
    _rollback("/sandboxes/{sandbox_id}/rollback"),
    _rollback("/vmcell/sandboxes/{sandbox_id}/rollback"),
    Operation(
        method="POST",
        path="/vmcell/sandboxes/{sandbox_id}/undo",
        summary="Takes back the last rollback, or undo, of a sandbox.",
        body={"type": "object"},
        answers={200: ref("RolledBackSandbox")},
        errors=(404, 409, 413, 504),
    ),
    _of_sandbox(
        "snapshots",
        "A sandbox's snapshots with parents and sizes, undo points too, oldest first.",
        array(ref("SandboxSnapshot")),
    ),
    Operation(
        method="GET",
        path="/vmcell/sandboxes/{sandbox_id}/diff",
        summary="Which parts of two snapshots differ; files=true: which files, asked of both.",
        query={"older": TEXT, "newer": TEXT, "files": one_of("true", "false")},
        required_query=("older", "newer"),
        answers={200: ref("SnapshotDifference")},
        errors=(404, 409, 504),
    ),
    _of_sandbox(
        "memory",
        "What a running sandbox has of the host's memory, guest RAM apart.",
        ref("SandboxMemory"),
    ),
)
