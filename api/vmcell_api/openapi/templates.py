"""E2B's template routes: making, building, tags, listing."""

from __future__ import annotations

from vmcell_api.openapi.operation import (
    FLAG,
    MOMENT,
    TEXT,
    TEXT_MAP,
    WHOLE,
    Operation,
    array,
    between,
    nullable,
    one_of,
    record,
    ref,
)

TAG = "templates"

_STATUS = one_of("waiting", "building", "ready", "error")
_LEVEL = one_of("debug", "info", "warn", "error")
_BUILD = "/templates/{template_id}/builds/{build_id}"
_PUBLIC = record({"public": FLAG})
_TEMPLATE = {
    "templateID": TEXT,
    "buildID": TEXT,
    "cpuCount": WHOLE,
    "memoryMB": WHOLE,
    "diskSizeMB": WHOLE,
    "public": FLAG,
    "aliases": array(TEXT),
    "names": array(TEXT),
    "createdAt": MOMENT,
    "updatedAt": MOMENT,
    "createdBy": nullable({"type": "object"}),
    "lastSpawnedAt": nullable(MOMENT),
    "spawnCount": WHOLE,
    "buildCount": WHOLE,
    "envdVersion": TEXT,
    "buildStatus": _STATUS,
}

SCHEMAS = {
    "NewTemplate": record(
        {},
        {
            "name": TEXT,
            "alias": TEXT,
            "tags": array(TEXT),
            "cpuCount": between(1, 8),
            "memoryMB": between(128, 65536),
            "teamID": TEXT,
        },
    ),
    "RequestedTemplate": record(
        {
            "templateID": TEXT,
            "buildID": TEXT,
            "public": FLAG,
            "names": array(TEXT),
            "tags": array(TEXT),
            "aliases": array(TEXT),
        }
    ),
    "Template": record(_TEMPLATE),
    "TemplateWithBuilds": record({**_TEMPLATE, "builds": array({"type": "object"})}),
    "TemplateStep": record(
        {"type": one_of("COPY", "RUN", "ENV", "WORKDIR", "USER"), "args": array(TEXT)},
        {"filesHash": TEXT, "force": FLAG},
    ),
    "BuildStart": record(
        {},
        {
            "fromImage": TEXT,
            "fromTemplate": TEXT,
            "fromImageRegistry": {"type": "object"},
            "force": FLAG,
            "steps": array(ref("TemplateStep"), maxItems=200),
            "startCmd": TEXT,
            "readyCmd": TEXT,
        },
    ),
    "BuildLogEntry": record(
        {"timestamp": MOMENT, "message": TEXT, "level": _LEVEL}, {"step": TEXT}
    ),
    "BuildStatus": record(
        {
            "templateID": TEXT,
            "buildID": TEXT,
            "status": _STATUS,
            "logs": array(TEXT),
            "logEntries": array(ref("BuildLogEntry")),
        },
        {
            "reason": record(
                {"message": TEXT}, {"step": TEXT, "logEntries": array(ref("BuildLogEntry"))}
            )
        },
    ),
    "TemplateTag": record({"tag": TEXT, "buildID": TEXT, "createdAt": MOMENT}),
}


def _listing(path: str, summary: str, query: dict[str, dict[str, object]]) -> Operation:
    return Operation(
        method="GET",
        path=path,
        summary=summary,
        query=query,
        answers={200: array(ref("Template"))},
        answer_headers=("X-Next-Token",) if query.get("nextToken") else (),
    )


_LISTS = (
    _listing("/templates", "The team's templates, then the installation's.", {"teamID": TEXT}),
    _listing("/v2/templates", "The same in pages.", {"limit": between(1, 100), "nextToken": TEXT}),
)
_ONE = (
    Operation(
        method="GET",
        path="/templates/{template_id}",
        summary="A template with its builds.",
        answers={200: ref("TemplateWithBuilds")},
        errors=(404,),
    ),
    Operation(
        method="DELETE",
        path="/templates/{template_id}",
        summary="Deletes a template; builds that run are cancelled.",
        answers={204: None},
        errors=(404, 409, 504),
    ),
    Operation(
        method="PATCH",
        path="/templates/{template_id}",
        summary="Opens a template to other teams, or closes it.",
        body=_PUBLIC,
        answers={200: {"type": "object"}},
        errors=(404, 413),
    ),
    Operation(
        method="PATCH",
        path="/v2/templates/{template_id}",
        summary="The same, answered with its names.",
        body=_PUBLIC,
        answers={200: record({"names": array(TEXT)})},
        errors=(404, 413),
    ),
    Operation(
        method="GET",
        path="/templates/aliases/{alias}",
        summary="Whose a name is: 404 nobody's, 403 another team's.",
        answers={200: record({"templateID": TEXT, "public": FLAG})},
        errors=(404,),
    ),
)
_BUILDS = (
    Operation(
        method="POST",
        path="/v3/templates",
        summary="Asks for a build, which another call starts.",
        body=ref("NewTemplate"),
        body_required=True,
        answers={202: ref("RequestedTemplate")},
        errors=(404, 409, 413),
    ),
    Operation(
        method="GET",
        path="/templates/{template_id}/files/{files_hash}",
        summary="Whether files for COPY are there, and a link that takes them.",
        answers={201: record({"present": FLAG}, {"url": TEXT, "headers": TEXT_MAP})},
        errors=(404,),
    ),
    Operation(
        method="POST",
        path=f"/v2{_BUILD}",
        summary="Starts a build.",
        body=ref("BuildStart"),
        body_required=True,
        answers={202: None},
        errors=(404, 409, 413, 504),
    ),
    Operation(
        method="DELETE",
        path=f"/v2{_BUILD}",
        summary="Cancels a build; an extension.",
        answers={204: None},
        errors=(404, 409, 504),
    ),
    Operation(
        method="GET",
        path=f"{_BUILD}/status",
        summary="How a build goes, with a page of its log.",
        query={"logsOffset": between(0, 1 << 31), "limit": between(1, 100), "level": _LEVEL},
        answers={200: ref("BuildStatus")},
        errors=(404, 504),
    ),
    Operation(
        method="GET",
        path=f"{_BUILD}/logs",
        summary="The log of a build.",
        query={"cursor": between(0, 1 << 31), "limit": between(1, 100), "level": _LEVEL},
        answers={200: record({"logs": array(ref("BuildLogEntry"))})},
        errors=(404, 504),
    ),
    Operation(
        method="PUT",
        path="/vmcell/uploads/{token}",
        summary="Takes a tar for COPY; the link is the permission.",
        answers={200: None},
        errors=(403, 404, 409, 413, 429, 500, 503),
        is_open=True,
    ),
)
_TAGS = (
    Operation(
        method="GET",
        path="/templates/{template_id}/tags",
        summary="The tags of a template.",
        answers={200: array(ref("TemplateTag"))},
        errors=(404,),
    ),
    Operation(
        method="POST",
        path="/templates/tags",
        summary="Lets tags stand for the build that another tag names.",
        body=record({"target": TEXT, "tags": array(TEXT)}),
        body_required=True,
        answers={201: record({"tags": array(TEXT), "buildID": TEXT})},
        errors=(404, 409, 413),
    ),
    Operation(
        method="DELETE",
        path="/templates/tags",
        summary="Removes tags.",
        body=record({"name": TEXT, "tags": array(TEXT)}),
        body_required=True,
        answers={204: None},
        errors=(404, 409, 413),
    ),
)

OPERATIONS = (*_LISTS, *_ONE, *_BUILDS, *_TAGS)
