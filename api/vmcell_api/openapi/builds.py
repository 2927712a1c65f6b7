"""Builds of templates: asked for, given files, started, watched, cancelled."""

from __future__ import annotations

from vmcell_api.openapi.operation import (
    BINARY,
    FLAG,
    MOMENT,
    TEXT,
    Json,
    Operation,
    array,
    between,
    nullable,
    one_of,
    record,
    ref,
)
from vmcell_api.openapi.templates import BUILD_STATES, NAME, TAGS
from vmcell_api.template_bodies import (
    LEVELS,
    MAX_COMMAND_CHARACTERS,
    MAX_LOG_OFFSET,
    MAX_STEPS,
    MEMORY_MIB,
    STEP_TYPES,
    VCPUS,
)
from vmcell_api.upload_store import PREFIX

TAG = "builds"


def _text(most_characters: int) -> Json:
    return {"type": "string", "minLength": 1, "maxLength": most_characters}


_COMMAND = {"type": "string", "maxLength": MAX_COMMAND_CHARACTERS}
_LOG_QUERY = {
    "limit": {**between(0, MAX_LOG_OFFSET), "description": "At most 100 are answered."},
    "level": one_of(*LEVELS),
}
_OFFSET = {**between(0, MAX_LOG_OFFSET), "description": "The first entry wanted, from 0."}
_BUILD = "/templates/{template_id}/builds/{build_id}"
_NEW = record(
    {},
    {
        "name": NAME,
        "alias": {**NAME, "description": "The older name of `name`."},
        "tags": TAGS,
        "cpuCount": between(VCPUS[0], VCPUS[-1]),
        "memoryMB": between(MEMORY_MIB[0], MEMORY_MIB[-1]),
        "teamID": {**TEXT, "description": "Ignored: a key has one team."},
    },
)
_START = {
    "fromImageRegistry": nullable(ref("RegistryLogin")),
    "force": FLAG,
    "steps": array(ref("BuildStep"), maxItems=MAX_STEPS),
    "startCmd": _COMMAND,
    "readyCmd": _COMMAND,
}

SCHEMAS = {
    "NewTemplate": {
        **_NEW,
        "anyOf": [record({"name": NAME}), record({"alias": NAME})],
    },
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
    "TemplateFiles": record(
        {"present": FLAG, "url": {**TEXT, "description": "Takes a PUT for an hour."}}
    ),
    "BuildStep": record(
        {"type": one_of(*STEP_TYPES)},
        {"args": array(TEXT), "filesHash": TEXT, "force": FLAG},
    ),
    "RegistryLogin": {
        "oneOf": [
            record(
                {"type": {"const": "registry"}, "username": _text(256), "password": _text(4000)}
            ),
            record({"type": {"const": "gcp"}, "serviceAccountJson": _text(16384)}),
        ]
    },
    "BuildStart": {
        **record({}, _START),
        "oneOf": [
            record({"fromImage": _text(MAX_COMMAND_CHARACTERS)}),
            record({"fromTemplate": _text(MAX_COMMAND_CHARACTERS)}),
        ],
    },
    "BuildLogEntry": record(
        {"timestamp": MOMENT, "message": TEXT, "level": one_of(*LEVELS)},
        {"step": {**TEXT, "description": "base, finalize, or the step's number."}},
    ),
    "BuildReason": record(
        {"message": TEXT}, {"step": TEXT, "logEntries": array(ref("BuildLogEntry"))}
    ),
    "BuildInfo": record(
        {
            "templateID": TEXT,
            "buildID": TEXT,
            "status": BUILD_STATES,
            "logs": array(TEXT),
            "logEntries": array(ref("BuildLogEntry")),
        },
        {"reason": ref("BuildReason")},
    ),
    "BuildLogs": record({"logs": array(ref("BuildLogEntry"))}),
}

OPERATIONS = (
    Operation(
        method="POST",
        path="/v3/templates",
        summary="Asks for a build of a template, which is made if there is none of that name.",
        body=ref("NewTemplate"),
        body_required=True,
        answers={202: ref("RequestedTemplate")},
        errors=(413,),
    ),
    Operation(
        method="GET",
        path="/templates/{template_id}/files/{files_hash}",
        summary="Whether files for COPY are here, and a link that takes them as a tar.",
        answers={201: ref("TemplateFiles")},
        errors=(404,),
    ),
    Operation(
        method="PUT",
        path=PREFIX + "{token}",
        summary="Takes a tar, gzipped or not; the link is the permission.",
        body=BINARY,
        body_required=True,
        body_media_type="application/octet-stream",
        answers={200: None},
        errors=(403, 413, 500, 503),
        is_open=True,
    ),
    Operation(
        method="POST",
        path=f"/v2{_BUILD}",
        summary="Starts a build that was asked for.",
        body=ref("BuildStart"),
        body_required=True,
        answers={202: None},
        errors=(404, 409, 413, 504),
    ),
    Operation(
        method="DELETE",
        path=f"/v2{_BUILD}",
        summary="Cancels a build; one that has ended stays as it is. E2B has no such route.",
        answers={204: None},
        errors=(404, 504),
    ),
    Operation(
        method="GET",
        path=f"{_BUILD}/status",
        summary="How a build goes, with a page of its log.",
        query={"logsOffset": _OFFSET, **_LOG_QUERY},
        answers={200: ref("BuildInfo")},
        errors=(404, 504),
    ),
    Operation(
        method="GET",
        path=f"{_BUILD}/logs",
        summary="A page of a build's log.",
        query={"cursor": _OFFSET, "direction": one_of("forward"), **_LOG_QUERY},
        answers={200: ref("BuildLogs")},
        errors=(404, 504),
    ),
)
