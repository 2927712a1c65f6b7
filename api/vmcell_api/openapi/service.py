"""The service itself: health, this document, metrics, and the CLI's question for its team."""

from __future__ import annotations

from vmcell_api.openapi.operation import FLAG, TEXT, Operation, array, record, ref

TAG = "service"

SCHEMAS = {
    "Error": record(
        {"code": {"type": "integer", "description": "The HTTP status."}, "message": TEXT},
        {"error_code": TEXT},
    ),
    "Health": record({"status": {"const": "ok"}}),
    "OwnTeam": record({"teamID": TEXT, "name": TEXT, "apiKey": TEXT, "isDefault": FLAG}),
}

OPERATIONS = (
    Operation(
        method="GET",
        path="/health",
        summary="Whether the API answers.",
        answers={200: ref("Health")},
        is_open=True,
    ),
    Operation(
        method="GET",
        path="/openapi.json",
        summary="This document.",
        answers={200: {"type": "object"}},
        is_open=True,
    ),
    Operation(
        method="GET",
        path="/metrics",
        summary="Counters and gauges for Prometheus.",
        answers={200: TEXT},
        media_type="text/plain",
    ),
    Operation(
        method="GET",
        path="/teams",
        summary="The team of the key, as the E2B CLI asks for it.",
        answers={200: array(ref("OwnTeam"))},
    ),
)
