"""What a sandbox does: its metrics and its logs."""

from __future__ import annotations

from vmcell_api.activity_routes import LAST_S, MOST_IDS
from vmcell_api.openapi.operation import (
    MOMENT,
    NUMBER,
    TEXT,
    TEXT_MAP,
    WHOLE,
    Operation,
    array,
    between,
    one_of,
    record,
    ref,
)
from vmcell_api.sandbox_logs import LATEST_MS, LEVELS, MAX_SEARCH_LENGTH, MOST_ENTRIES

TAG = "activity"

_BYTES = {**WHOLE, "description": "Bytes."}
_UNIX_S = {**between(0, LAST_S), "description": "Unix seconds."}
_UNIX_MS = {**between(0, LATEST_MS - 1), "description": "Unix milliseconds."}
_LIMIT = between(1, MOST_ENTRIES)

SCHEMAS = {
    "SandboxMetric": record(
        {
            "timestamp": MOMENT,
            "timestampUnix": {**WHOLE, "description": "Seconds."},
            "cpuCount": WHOLE,
            "cpuUsedPct": NUMBER,
            "memUsed": _BYTES,
            "memTotal": _BYTES,
            "memCache": _BYTES,
            "diskUsed": _BYTES,
            "diskTotal": _BYTES,
        }
    ),
    "SandboxMetricsById": record(
        {
            "sandboxes": {
                "type": "object",
                "additionalProperties": {"$ref": "#/components/schemas/SandboxMetric"},
            }
        }
    ),
    "SandboxLogLine": record({"timestamp": MOMENT, "line": {**TEXT, "description": "JSON."}}),
    "SandboxLogEntry": record(
        {"timestamp": MOMENT, "message": TEXT, "level": one_of(*LEVELS), "fields": TEXT_MAP}
    ),
    "SandboxLogs": record(
        {"logs": array(ref("SandboxLogLine")), "logEntries": array(ref("SandboxLogEntry"))}
    ),
    "SandboxLogsV2": record({"logs": array(ref("SandboxLogEntry"))}),
}

OPERATIONS = (
    Operation(
        method="GET",
        path="/sandboxes/{sandbox_id}/metrics",
        summary="What a sandbox used from `start` to `end`, oldest first.",
        query={"start": _UNIX_S, "end": _UNIX_S},
        answers={200: array(ref("SandboxMetric"))},
        errors=(404, 504),
    ),
    Operation(
        method="GET",
        path="/sandboxes/metrics",
        summary="The newest sample of each sandbox; those without one are left out.",
        query={"sandbox_ids": {**TEXT, "description": f"1 to {MOST_IDS} ids, joined by commas."}},
        required_query=("sandbox_ids",),
        answers={200: ref("SandboxMetricsById")},
        errors=(504,),
    ),
    Operation(
        method="GET",
        path="/sandboxes/{sandbox_id}/logs",
        summary="What the sandbox's envd logged from `start` on, as the CLI asks.",
        query={"start": _UNIX_MS, "limit": _LIMIT},
        answers={200: ref("SandboxLogs")},
        errors=(404, 409, 502, 504),
    ),
    Operation(
        method="GET",
        path="/v2/sandboxes/{sandbox_id}/logs",
        summary="The same by cursor, direction, lowest level and words.",
        query={
            "cursor": _UNIX_MS,
            "limit": _LIMIT,
            "direction": one_of("forward", "backward"),
            "level": one_of(*LEVELS),
            "search": {"type": "string", "maxLength": MAX_SEARCH_LENGTH},
        },
        answers={200: ref("SandboxLogsV2")},
        errors=(404, 409, 502, 504),
    ),
)
