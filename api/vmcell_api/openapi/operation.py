"""One operation of the API, and short words for JSON schemas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

PATH_PARAMETER = re.compile(r"\{(\w+)\}")
# Any call may end so: bad input, no key, a key without the scope, the rate, a bug, no store.
COMMON_ERRORS = (400, 401, 403, 429, 500, 503)

TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
FLAG: Json = {"type": "boolean"}
MOMENT: Json = {"type": "string", "format": "date-time"}
BINARY: Json = {"type": "string", "format": "binary"}
TEXT_MAP: Json = {"type": "object", "additionalProperties": TEXT}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method on a path, as Falcon writes it: `/sandboxes/{sandbox_id}`.

    `answers`: status → schema of its JSON body, None for no body; empty where every request is
    refused. `errors`: statuses beside `COMMON_ERRORS`, with E2B's error body. `query`, `headers`:
    name → schema; those in `required_query` may not be left out. `is_open`: needs no key.
    `media_type`, `body_media_type`: of the good answers and the body, when they are not JSON.
    """

    method: str
    path: str
    summary: str
    answers: Mapping[int, Json | None]
    errors: tuple[int, ...] = ()
    body: Json | None = None
    body_required: bool = False
    body_media_type: str = "application/json"
    query: Mapping[str, Json] = field(default_factory=dict)
    required_query: tuple[str, ...] = ()
    headers: Mapping[str, Json] = field(default_factory=dict)
    answer_headers: tuple[str, ...] = ()
    media_type: str = "application/json"
    is_open: bool = False

    @property
    def path_parameters(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(PATH_PARAMETER.findall(self.path))


def ref(name: str) -> Json:
    """A schema of the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def array(item: Json, **bounds: int) -> Json:
    """A list."""
    return {"type": "array", "items": item, **bounds}


def record(required: Mapping[str, Json], optional: Mapping[str, Json] | None = None) -> Json:
    """An object with these fields, and perhaps others."""
    schema: Json = {"type": "object", "properties": {**required, **(optional or {})}}
    if required:
        schema["required"] = list(required)
    return schema


def nullable(schema: Json) -> Json:
    """The same, or null."""
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def between(lowest: int, highest: int) -> Json:
    """A whole number."""
    return {"type": "integer", "minimum": lowest, "maximum": highest}


def one_of(*words: str) -> Json:
    """One of these words."""
    return {"type": "string", "enum": list(words)}
