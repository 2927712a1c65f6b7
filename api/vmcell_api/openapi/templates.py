"""Templates, their names and their tags. `{template_id}` may be a name, percent-encoded."""

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
from vmcell_api.sandbox_bodies import MAX_PAGE
from vmcell_api.template_bodies import MAX_NAME_TEXT
from vmcell_api.template_names import MAX_TAGS

TAG = "templates"

BUILD_STATES = one_of("waiting", "building", "ready", "error")
NAME: Json = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_NAME_TEXT,
    "description": "name, name:tag or team/name:tag.",
    "examples": ["my-template"],
}
TAGS: Json = array({"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"}, maxItems=MAX_TAGS)

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
    "buildStatus": BUILD_STATES,
}

SCHEMAS = {
    "Template": record(_TEMPLATE),
    "TemplateBuild": record(
        {
            "buildID": TEXT,
            "status": BUILD_STATES,
            "createdAt": MOMENT,
            "updatedAt": MOMENT,
            "cpuCount": WHOLE,
            "memoryMB": WHOLE,
            "envdVersion": TEXT,
        },
        {"finishedAt": MOMENT},
    ),
    "TemplateWithBuilds": record({**_TEMPLATE, "builds": array(ref("TemplateBuild"))}),
    "TemplateVisibility": record({"public": FLAG}),
    "TemplateNames": record({"names": array(TEXT)}),
    "TemplateAlias": record({"templateID": TEXT, "public": FLAG}),
    "TemplateTag": record({"tag": TEXT, "buildID": TEXT, "createdAt": MOMENT}),
    "AssignTags": record({"target": NAME, "tags": {**TAGS, "minItems": 1}}),
    "AssignedTags": record({"tags": array(TEXT), "buildID": TEXT}),
    "RemoveTags": record({"name": NAME, "tags": {**TAGS, "minItems": 1}}),
}


def _set_public(path: str, answer: Json) -> Operation:
    return Operation(
        method="PATCH",
        path=path,
        summary="Opens a template to other teams, or closes it.",
        body=ref("TemplateVisibility"),
        body_required=True,
        answers={200: answer},
        errors=(404, 413),
    )


OPERATIONS = (
    Operation(
        method="GET",
        path="/templates",
        summary="The team's templates, then the installation's.",
        query={"teamID": {**TEXT, "description": "Ignored: a key has one team."}},
        answers={200: array(ref("Template"))},
        errors=(504,),
    ),
    Operation(
        method="GET",
        path="/v2/templates",
        summary="One page of them; X-Next-Token is there when more follow.",
        query={"limit": between(1, MAX_PAGE), "nextToken": TEXT},
        answers={200: array(ref("Template"), maxItems=MAX_PAGE)},
        answer_headers=("X-Next-Token",),
        errors=(504,),
    ),
    Operation(
        method="GET",
        path="/templates/{template_id}",
        summary="A template with its builds, the newest first.",
        answers={200: ref("TemplateWithBuilds")},
        errors=(404, 504),
    ),
    _set_public("/templates/{template_id}", {"type": "object"}),
    _set_public("/v2/templates/{template_id}", ref("TemplateNames")),
    Operation(
        method="DELETE",
        path="/templates/{template_id}",
        summary="Deletes a template or a snapshot; builds that run are cancelled.",
        answers={204: None},
        errors=(404, 409, 504),
    ),
    Operation(
        method="GET",
        path="/templates/aliases/{alias}",
        summary="Which template has the name; 403 when it is another team's.",
        answers={200: ref("TemplateAlias")},
        errors=(404,),
    ),
    Operation(
        method="GET",
        path="/templates/{template_id}/tags",
        summary="The tags that stand for a build which is ready.",
        answers={200: array(ref("TemplateTag"))},
        errors=(404, 504),
    ),
    Operation(
        method="POST",
        path="/templates/tags",
        summary="Lets tags stand for the build that `target` names.",
        body=ref("AssignTags"),
        body_required=True,
        answers={201: ref("AssignedTags")},
        errors=(404, 413, 504),
    ),
    Operation(
        method="DELETE",
        path="/templates/tags",
        summary="Removes tags; the body is on the DELETE.",
        body=ref("RemoveTags"),
        body_required=True,
        answers={204: None},
        errors=(404, 413),
    ),
)
