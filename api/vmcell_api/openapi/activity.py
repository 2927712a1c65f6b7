"""What a sandbox does and may reach: metrics, logs, network; and what needs snapshots."""

from __future__ import annotations

from vmcell_api.openapi.operation import (
    FLAG,
    MOMENT,
    TEXT,
    TEXT_MAP,
    WHOLE,
    Json,
    Operation,
    array,
    between,
    one_of,
    record,
    ref,
)

TAG = "activity"

_NUMBER: Json = {"type": "number"}
_MS, _S = between(0, 253402300799999), between(0, 253402300799)
_LEVEL = one_of("debug", "info", "warn", "error")

SCHEMAS = {
    "SandboxMetric": record(
        {
            "timestamp": MOMENT,
            "timestampUnix": WHOLE,
            "cpuCount": WHOLE,
            "cpuUsedPct": _NUMBER,
            "memUsed": WHOLE,
            "memTotal": WHOLE,
            "memCache": WHOLE,
            "diskUsed": WHOLE,
            "diskTotal": WHOLE,
        }
    ),
    "SandboxLogEntry": record(
        {"timestamp": MOMENT, "message": TEXT, "level": _LEVEL, "fields": TEXT_MAP}
    ),
    "SandboxNetworkUpdate": record(
        {},
        {
            "allowOut": array(TEXT),
            "denyOut": array(TEXT),
            "allow_internet_access": FLAG,
        },
    ),
    "SnapshotInfo": record({"snapshotID": TEXT, "names": array(TEXT)}),
}


def _needs_snapshots(
    verb: str, summary: str, body: Json, answers: dict[int, Json | None]
) -> Operation:
    return Operation(
        method="POST",
        path=f"/sandboxes/{{sandbox_id}}/{verb}",
        summary=f"{summary} 501 where the server has no snapshots.",
        body=body,
        answers=answers,
        errors=(404, 409, 413, 501),
    )


OPERATIONS = (
    Operation(
        method="PUT",
        path="/sandboxes/{sandbox_id}/network",
        summary="Replaces what the sandbox may reach; what is left out is cleared.",
        body=ref("SandboxNetworkUpdate"),
        answers={204: None},
        errors=(404, 409, 413, 504),
    ),
    Operation(
        method="GET",
        path="/sandboxes/metrics",
        summary="The newest sample of each sandbox.",
        query={"sandbox_ids": {**TEXT, "description": "1 to 100 ids with commas between."}},
        answers={200: record({"sandboxes": {"type": "object"}})},
        errors=(404,),
    ),
    Operation(
        method="GET",
        path="/sandboxes/{sandbox_id}/metrics",
        summary="The samples of a time, oldest first.",
        query={"start": _S, "end": _S},
        answers={200: array(ref("SandboxMetric"))},
        errors=(404, 409, 504),
    ),
    Operation(
        method="GET",
        path="/sandboxes/{sandbox_id}/logs",
        summary="The log from a moment on, as the CLI asks.",
        query={"start": _MS, "limit": between(1, 1000)},
        answers={
            200: record(
                {
                    "logs": array(record({"timestamp": MOMENT, "line": TEXT})),
                    "logEntries": array(ref("SandboxLogEntry")),
                }
            )
        },
        errors=(404, 409, 504),
    ),
    Operation(
        method="GET",
        path="/v2/sandboxes/{sandbox_id}/logs",
        summary="The log by cursor, direction, level and words.",
        query={
            "cursor": _MS,
            "limit": between(1, 1000),
            "direction": one_of("forward", "backward"),
            "level": _LEVEL,
            "search": TEXT,
        },
        answers={200: record({"logs": array(ref("SandboxLogEntry"))})},
        errors=(404, 409, 504),
    ),
    Operation(
        method="GET",
        path="/snapshots",
        summary="The team's snapshots.",
        query={
            "sandboxID": TEXT,
            "name": TEXT,
            "limit": between(1, 100),
            "nextToken": TEXT,
        },
        answers={200: array(ref("SnapshotInfo"))},
        answer_headers=("X-Next-Token",),
    ),
    _needs_snapshots(
        "pause",
        "Pauses a sandbox.",
        record({}, {"memory": FLAG, "requireHealthyGuest": FLAG}),
        {204: None},
    ),
    _needs_snapshots(
        "resume",
        "Resumes a paused sandbox; 409 for one that runs.",
        record({}, {"timeout": between(0, 34_560_000), "autoPause": FLAG, "memory": FLAG}),
        {201: ref("Sandbox")},
    ),
    _needs_snapshots(
        "snapshots",
        "Takes a snapshot of a sandbox that goes on.",
        record({}, {"name": TEXT, "memory": FLAG}),
        {201: ref("SnapshotInfo")},
    ),
    _needs_snapshots(
        "rollback",
        "Takes a sandbox back to a snapshot (cubesandbox).",
        record({}, {"snapshotID": TEXT}),
        {204: None},
    ),
    _needs_snapshots(
        "fork",
        "Makes running copies.",
        record({}, {"timeout": between(0, 34_560_000), "count": between(1, 20)}),
        {201: array({"type": "object"})},
    ),
)
