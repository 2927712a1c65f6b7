"""All operations as one OpenAPI 3.1 document."""

from __future__ import annotations

from typing import Protocol

from vmcell_api.openapi import (
    activity,
    builds,
    operators,
    sandboxes,
    secrets,
    service,
    snapshots,
    templates,
    volumes,
)
from vmcell_api.openapi.operation import COMMON_ERRORS, TEXT, Json, Operation, ref
from vmcell_api.scopes import needed_scope

RESOURCES = (
    *(service, sandboxes, snapshots, activity),
    *(templates, builds, volumes, secrets, operators),
)
VERSION = "0.1.0"


class Resource(Protocol):
    """What each module of RESOURCES has."""

    TAG: str
    OPERATIONS: tuple[Operation, ...]
    SCHEMAS: dict[str, Json]


def operations() -> list[tuple[str, Operation]]:
    """Every operation with its resource's tag."""
    return [(resource.TAG, row) for resource in RESOURCES for row in resource.OPERATIONS]


def build_document() -> Json:
    """The document; raises ValueError when two resources define one thing."""
    paths: dict[str, Json] = {}
    schemas: dict[str, Json] = {}
    for resource in RESOURCES:
        for name, schema in resource.SCHEMAS.items():
            if schemas.setdefault(name, schema) is not schema:
                raise ValueError(f"schema {name} is defined twice")
    for tag, row in operations():
        methods = paths.setdefault(row.path, {})
        if row.method.lower() in methods:
            raise ValueError(f"{row.method} {row.path} is defined twice")
        methods[row.method.lower()] = _operation(tag, row)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vmcell",
            "version": VERSION,
            "description": "E2B's control plane, and vmcell's own routes under /vmcell/.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-KEY"},
                "Bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(tag: str, row: Operation) -> Json:
    words = [word.strip("{}") for word in row.path.split("/") if word]
    operation: Json = {
        "operationId": "_".join([row.method.lower(), *words]).replace(".", "_"),
        "tags": [tag],
        "summary": row.summary,
        "responses": _responses(row),
    }
    if parameters := _parameters(row):
        operation["parameters"] = parameters
    if row.body is not None:
        operation["requestBody"] = {
            "required": row.body_required,
            "content": {row.body_media_type: {"schema": row.body}},
        }
    if not row.is_open:
        operation["security"] = [{"ApiKey": []}, {"Bearer": []}]
        operation["x-vmcell-scope"] = needed_scope(row.method, row.path)
    return operation


def _parameters(row: Operation) -> list[Json]:
    return [
        *(
            {"name": name, "in": "path", "required": True, "schema": TEXT}
            for name in row.path_parameters
        ),
        *(
            {"name": name, "in": "query", "required": name in row.required_query, "schema": schema}
            for name, schema in row.query.items()
        ),
        *(
            {"name": name, "in": "header", "required": False, "schema": schema}
            for name, schema in row.headers.items()
        ),
    ]


def _responses(row: Operation) -> Json:
    headers = {name: {"schema": TEXT} for name in row.answer_headers}
    responses: Json = {}
    for status, schema in row.answers.items():
        answer: Json = {"description": "Done."}
        if schema is not None:
            answer["content"] = {row.media_type: {"schema": schema}}
        if headers:
            answer["headers"] = headers
        responses[str(status)] = answer
    errors = (400,) if row.is_open else COMMON_ERRORS
    for status in sorted({*errors, *row.errors}):
        responses[str(status)] = {
            "description": "Refused or failed; `message` says why.",
            "content": {"application/json": {"schema": ref("Error")}},
        }
    return responses
