"""Teams, keys and audit, for keys with the scope `admin`."""

from __future__ import annotations

from vmcell_api.openapi.operation import (
    MOMENT,
    TEXT,
    WHOLE,
    Operation,
    array,
    between,
    nullable,
    one_of,
    record,
    ref,
)
from vmcell_api.scopes import SCOPES
from vmcell_api.store.teams import LIMITS, TEAM_NAME
from vmcell_api.tenancy import MAX_GRACE_S, MAX_KEY_LIFE_S

TAG = "operators"


def _bounds(limit: str) -> dict[str, object]:
    return between(LIMITS[limit][0], LIMITS[limit][-1])


_LIMITS = {
    "sandboxLimit": _bounds("sandbox_limit"),
    "maxTimeout": nullable({**_bounds("max_timeout_s"), "description": "Seconds."}),
    "requestsPerSecond": nullable(_bounds("requests_per_s")),
}
_TEAM = {"teamID": TEXT, "name": TEXT, **_LIMITS}
_KEY = {
    "keyID": TEXT,
    "teamID": TEXT,
    "name": TEXT,
    "prefix": TEXT,
    "scopes": array(one_of(*SCOPES)),
    "state": one_of("active", "expired", "revoked"),
    "createdAt": MOMENT,
    "expiresAt": nullable(MOMENT),
    "lastUsedAt": nullable(MOMENT),
}

SCHEMAS = {
    "Team": record(_TEAM),
    "TeamSummary": record({**_TEAM, "createdAt": MOMENT, "keyCount": WHOLE, "sandboxCount": WHOLE}),
    "NewTeam": record({"name": {"type": "string", "pattern": f"^{TEAM_NAME.pattern}$"}}, _LIMITS),
    "TeamLimits": record({}, _LIMITS),
    "ApiKey": record(_KEY),
    "NewApiKey": record(
        {},
        {
            "name": {"type": "string", "maxLength": 64},
            "scopes": array(one_of(*SCOPES), minItems=1),
            "expiresIn": {**between(0, MAX_KEY_LIFE_S), "description": "Seconds; 0: never."},
        },
    ),
    "ApiKeyWithKey": record({**_KEY, "key": {**TEXT, "description": "Shown this once."}}),
    "AuditEntry": record(
        {
            "at": MOMENT,
            "requestID": TEXT,
            "teamID": TEXT,
            "actor": TEXT,
            "action": TEXT,
            "target": TEXT,
            "status": WHOLE,
            "result": TEXT,
        }
    ),
}

OPERATIONS = (
    Operation(
        method="GET",
        path="/vmcell/teams",
        summary="All teams.",
        answers={200: array(ref("TeamSummary"))},
    ),
    Operation(
        method="POST",
        path="/vmcell/teams",
        summary="A new team.",
        body=ref("NewTeam"),
        body_required=True,
        answers={201: ref("Team")},
        errors=(409, 413),
    ),
    Operation(
        method="PATCH",
        path="/vmcell/teams/{team}",
        summary="Changes limits; null is the service's own.",
        body=ref("TeamLimits"),
        answers={200: ref("Team")},
        errors=(404, 413),
    ),
    Operation(
        method="DELETE",
        path="/vmcell/teams/{team}",
        summary="Deletes a team that has no running sandboxes, with its keys.",
        answers={204: None},
        errors=(404,),
    ),
    Operation(
        method="GET",
        path="/vmcell/teams/{team}/keys",
        summary="The team's keys, without the keys.",
        answers={200: array(ref("ApiKey"))},
        errors=(404,),
    ),
    Operation(
        method="POST",
        path="/vmcell/teams/{team}/keys",
        summary="A new key, shown this once.",
        body=ref("NewApiKey"),
        answers={201: ref("ApiKeyWithKey")},
        errors=(404, 413),
    ),
    Operation(
        method="POST",
        path="/vmcell/keys/{key_id}/rotate",
        summary="A key in its place; the old one stays valid for `grace` seconds.",
        body=record({}, {"grace": between(0, MAX_GRACE_S)}),
        answers={201: ref("ApiKeyWithKey")},
        errors=(404, 413),
    ),
    Operation(
        method="DELETE",
        path="/vmcell/keys/{key_id}",
        summary="Revokes a key, at once.",
        answers={204: None},
        errors=(404,),
    ),
    Operation(
        method="GET",
        path="/vmcell/audit",
        summary="What was done, newest first.",
        query={
            "teamID": TEXT,
            "action": TEXT,
            "target": TEXT,
            "result": TEXT,
            "since": {**between(0, 1 << 39), "description": "Unix seconds."},
            "limit": between(1, 1000),
        },
        answers={200: array(ref("AuditEntry"))},
    ),
)
