"""E2B's sandbox routes."""

from __future__ import annotations

from vmcell_api.create_once import KEY_FORM
from vmcell_api.egress import MAX_RULES
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
from vmcell_api.sandbox_bodies import MAX_REFRESH_S, NO_END, NO_END_S

TAG = "sandboxes"

_TIMEOUT = {
    "anyOf": [between(1, NO_END_S), {"const": NO_END}],
    "description": f"Seconds from now; a team may have less. {NO_END}: the most, where allowed.",
}
_NEW = {
    "timeout": _TIMEOUT,
    "metadata": TEXT_MAP,
    "envVars": TEXT_MAP,
    "allow_internet_access": FLAG,
    "autoPause": FLAG,
    "autoResume": record({}, {"enabled": FLAG}),
    "lifecycle": record({}, {"onTimeout": one_of("kill", "pause"), "autoResume": FLAG}),
    "network": ref("SandboxNetwork"),
    "mcp": {"type": "object"},
    "iam": {"type": "object"},
    "volumeMounts": array(record({"name": TEXT, "path": TEXT})),
}
_RULES = {**array(TEXT, maxItems=MAX_RULES), "description": "IPv4 addresses and CIDR blocks."}
_EGRESS = {"allowOut": nullable(_RULES), "denyOut": nullable(_RULES)}
_TEMPLATE_ID = {"type": "string", "minLength": 1, "maxLength": 512, "examples": ["base"]}
_LISTED = {
    "sandboxID": TEXT,
    "templateID": TEXT,
    "clientID": TEXT,
    "envdVersion": TEXT,
    "startedAt": MOMENT,
    "endAt": MOMENT,
    "cpuCount": WHOLE,
    "memoryMB": WHOLE,
    "diskSizeMB": WHOLE,
    "state": one_of("running", "paused"),
}
_LISTED_OPTIONAL = {
    "alias": TEXT,
    "metadata": TEXT_MAP,
    "volumeMounts": array({"type": "object"}),
}

SCHEMAS = {
    "NewSandbox": record({"templateID": _TEMPLATE_ID}, {**_NEW, "secure": FLAG}),
    "NewSandboxV2": record({"templateID": _TEMPLATE_ID}, _NEW),
    "Sandbox": record(
        {"sandboxID": TEXT, "templateID": TEXT, "clientID": TEXT, "envdVersion": TEXT},
        {
            "alias": TEXT,
            "domain": nullable(TEXT),
            "envdAccessToken": TEXT,
            "trafficAccessToken": nullable(TEXT),
        },
    ),
    "ListedSandbox": record(_LISTED, _LISTED_OPTIONAL),
    "SandboxDetail": record(
        _LISTED,
        {
            **_LISTED_OPTIONAL,
            "domain": nullable(TEXT),
            "envdAccessToken": TEXT,
            "allowInternetAccess": nullable(FLAG),
            "lifecycle": record({"autoResume": FLAG, "onTimeout": one_of("kill", "pause")}),
            "network": record(
                {"allowOut": array(TEXT), "denyOut": array(TEXT), "allowPublicTraffic": FLAG}
            ),
        },
    ),
    "SandboxNetwork": record({}, {**_EGRESS, "allowPublicTraffic": nullable(FLAG)}),
    "SandboxNetworkUpdate": record({}, {**_EGRESS, "allow_internet_access": nullable(FLAG)}),
}

_PAGE_QUERY = {
    "metadata": {**TEXT, "description": "A form of percent-encoded pairs, encoded as a whole."},
    "state": {**TEXT, "pattern": "^(running|paused)(,(running|paused))*$"},
    "order": one_of("asc", "desc"),
    "startedAfter": MOMENT,
    "template": TEXT,
    "limit": between(1, 100),
    "nextToken": TEXT,
}
_CREATE_ERRORS = (404, 409, 413, 422, 504)


def _create(path: str, body: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        summary="Makes a sandbox; the answer comes when it can be used.",
        body=ref(body),
        body_required=True,
        headers={"Idempotency-Key": {"type": "string", "pattern": f"^{KEY_FORM.pattern}$"}},
        answers={201: ref("Sandbox")},
        errors=_CREATE_ERRORS,
    )


OPERATIONS = (
    _create("/sandboxes", "NewSandbox"),
    _create("/v2/sandboxes", "NewSandboxV2"),
    Operation(
        method="GET",
        path="/sandboxes",
        summary="All sandboxes at once, as SDKs up to 1.2 ask for them.",
        query={"metadata": TEXT},
        answers={200: array(ref("ListedSandbox"))},
        answer_headers=("X-Total-Running",),
        errors=(504,),
    ),
    Operation(
        method="GET",
        path="/v2/sandboxes",
        summary="One page of sandboxes; X-Next-Token is there when more follow.",
        query=_PAGE_QUERY,
        answers={200: array(ref("ListedSandbox"), maxItems=100)},
        answer_headers=("X-Next-Token", "X-Total-Running"),
        errors=(504,),
    ),
    Operation(
        method="GET",
        path="/sandboxes/{sandbox_id}",
        summary="One sandbox.",
        answers={200: ref("SandboxDetail")},
        errors=(404, 504),
    ),
    Operation(
        method="DELETE",
        path="/sandboxes/{sandbox_id}",
        summary="Ends a sandbox.",
        answers={204: None},
        errors=(404, 504),
    ),
    Operation(
        method="POST",
        path="/sandboxes/{sandbox_id}/timeout",
        summary="Sets the time that is left; 0 ends or pauses the sandbox at once.",
        body=record({"timeout": between(0, NO_END_S)}),
        body_required=True,
        answers={204: None},
        errors=(404, 409, 413, 504),
    ),
    Operation(
        method="POST",
        path="/sandboxes/{sandbox_id}/refreshes",
        summary="Extends the time, as SDKs 1.x do.",
        body=record({}, {"duration": between(0, MAX_REFRESH_S)}),
        answers={204: None},
        errors=(404, 409, 413, 504),
    ),
    Operation(
        method="PUT",
        path="/sandboxes/{sandbox_id}/network",
        summary="Replaces what the sandbox may reach; what is left out is open again.",
        body=ref("SandboxNetworkUpdate"),
        answers={204: None},
        errors=(404, 409, 413, 504),
    ),
)
