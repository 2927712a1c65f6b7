"""Secrets of a team: all of E2B's calls, each refused."""

from __future__ import annotations

from vmcell_api.openapi.operation import Json, Operation

TAG = "secrets"

SCHEMAS: dict[str, Json] = {}

OPERATIONS = tuple(
    Operation(
        method=method,
        path=path,
        summary="Refused with 501: secrets are for network rules that rewrite requests.",
        answers={},
        errors=(501,),
    )
    for method, path in (
        ("GET", "/secrets"),
        ("POST", "/secrets"),
        ("GET", "/secrets/{secret_id}"),
        ("POST", "/secrets/{secret_id}"),
        ("DELETE", "/secrets/{secret_id}"),
    )
)
