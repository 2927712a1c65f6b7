"""The operators' routes: teams, keys, audit, metrics; and the CLI's `GET /teams`.

All of `/vmcell/…` and `/metrics` need the scope `admin` (`vmcell_api.scopes`).
"""

from __future__ import annotations

import functools
import json
from urllib.parse import parse_qsl

import falcon

from vmcell_api.access import presented_key
from vmcell_api.json_body import int_field, request_json, text_field
from vmcell_api.metrics import CONTENT_TYPE, Metrics
from vmcell_api.node_client import NodeVerbs
from vmcell_api.openapi.document import build_document
from vmcell_api.query_numbers import query_number
from vmcell_api.sandbox_answers import rfc3339
from vmcell_api.store.api_keys import MAX_NAME_LENGTH, ApiKey, ApiKeys
from vmcell_api.store.audit import Audit, AuditEntry, AuditQuery
from vmcell_api.store.records import Store, Team, now_ms
from vmcell_api.store.teams import LIMITS, Teams
from vmcell_api.tenancy import MAX_GRACE_S, MAX_KEY_LIFE_S, create_key, remove_team, rotate_key
from vmcell_protos.errors import CallerError

Json = dict[str, object]
LIMIT_FIELDS = {
    "sandboxLimit": "sandbox_limit",
    "maxTimeout": "max_timeout_s",
    "requestsPerSecond": "requests_per_s",
}
MAX_AUDIT_PAGE = 1000


class OwnTeam:
    """`GET /teams`: the one team that a key is of, as the E2B CLI wants it at login."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The key comes back as it was sent; the server has only its hash."""
        team: Team = req.context.team
        resp.media = [
            {
                "teamID": team.team_id,
                "name": team.name,
                "apiKey": presented_key(req),
                "isDefault": True,
            }
        ]


class AllTeams:
    """`/vmcell/teams`."""

    def __init__(self, store: Store) -> None:
        self._teams = Teams(store.engine)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """All teams."""
        resp.media = [
            {
                **team_json(row.team),
                "createdAt": rfc3339(row.created_at_unix_ms),
                "keyCount": row.key_count,
                "sandboxCount": row.sandbox_count,
            }
            for row in self._teams.list()
        ]

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A new team."""
        body = request_json(req)
        name = text_field(body, "name", max_length=MAX_NAME_LENGTH)
        resp.media = team_json(self._teams.create(name, _limits(body)))
        resp.status = 201


class OneTeam:
    """`/vmcell/teams/{team}` and its keys; `team` is a name or an id."""

    def __init__(self, store: Store, node: NodeVerbs) -> None:
        self._store = store
        self._node = node
        self._teams = Teams(store.engine)

    def on_patch(self, req: falcon.Request, resp: falcon.Response, team: str) -> None:
        """Changes limits."""
        limits = _limits(request_json(req))
        found = self._teams.find(team)
        resp.media = team_json(self._teams.change_limits(found.team_id, limits))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, team: str) -> None:
        """Deletes a team that has no running sandboxes."""
        remove_team(self._store, self._node, self._teams.find(team), kill=False)
        resp.status = 204

    def on_get_keys(self, req: falcon.Request, resp: falcon.Response, team: str) -> None:
        """The team's keys."""
        found = self._teams.find(team)
        resp.media = [key_json(key) for key in ApiKeys(self._store.engine).list(found.team_id)]

    def on_post_keys(self, req: falcon.Request, resp: falcon.Response, team: str) -> None:
        """A new key, shown this once."""
        body = request_json(req)
        scopes = body.get("scopes", ["*"])
        if not isinstance(scopes, list) or not all(isinstance(word, str) for word in scopes):
            raise CallerError("scopes takes a list of strings")
        name = text_field(body, "name", max_length=MAX_NAME_LENGTH) if body.get("name") else ""
        life_s = int_field(body, "expiresIn", default=0, bounds=range(MAX_KEY_LIFE_S + 1))
        key, record = create_key(
            self._store, self._teams.find(team), scopes=scopes, name=name, life_s=life_s or None
        )
        resp.media = {**key_json(record), "key": key}
        resp.status = 201


class OneKey:
    """`/vmcell/keys/{key_id}`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def on_post_rotate(self, req: falcon.Request, resp: falcon.Response, key_id: str) -> None:
        """A key in its place; the old one stays valid for `grace` seconds."""
        bounds = range(MAX_GRACE_S + 1)
        grace_s = int_field(request_json(req), "grace", default=0, bounds=bounds)
        key, record = rotate_key(self._store, key_id, grace_s=grace_s)
        resp.media = {**key_json(record), "key": key}
        resp.status = 201

    def on_delete(self, req: falcon.Request, resp: falcon.Response, key_id: str) -> None:
        """Revokes it, at once."""
        ApiKeys(self._store.engine).revoke(key_id)
        resp.status = 204


class AuditLog:
    """`GET /vmcell/audit`."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Entries, newest first."""
        query = dict(parse_qsl(req.query_string, keep_blank_values=True))
        limit = _whole(query, "limit", default=100, bounds=range(1, MAX_AUDIT_PAGE + 1))
        since_s = _whole(query, "since", default=0, bounds=range(1 << 40))
        found = self._audit.find(
            AuditQuery(
                team_id=query.get("teamID", ""),
                action=query.get("action", ""),
                target=query.get("target", ""),
                result=query.get("result", ""),
                since_unix_ms=since_s * 1000,
                limit=limit,
            )
        )
        resp.media = [audit_json(entry) for entry in found]


class MetricsPage:
    """`GET /metrics`, for Prometheus, whose `authorization` setting sends the admin's key."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Prometheus' text format."""
        resp.content_type = CONTENT_TYPE
        resp.data = self._metrics.render()


class Document:
    """`GET /openapi.json`."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The API's own description; needs no key."""
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _document()


def add_operator_routes(
    app: falcon.App, store: Store, node: NodeVerbs, audit: Audit, metrics: Metrics
) -> None:
    """Adds the routes of this module to `app`."""
    team, key = OneTeam(store, node), OneKey(store)
    app.add_route("/openapi.json", Document())
    app.add_route("/metrics", MetricsPage(metrics))
    app.add_route("/teams", OwnTeam())
    app.add_route("/vmcell/teams", AllTeams(store))
    app.add_route("/vmcell/teams/{team}", team)
    app.add_route("/vmcell/teams/{team}/keys", team, suffix="keys")
    app.add_route("/vmcell/keys/{key_id}", key)
    app.add_route("/vmcell/keys/{key_id}/rotate", key, suffix="rotate")
    app.add_route("/vmcell/audit", AuditLog(audit))


def team_json(team: Team) -> Json:
    """A team; a limit that is null is the service's."""
    limits = {field: getattr(team, name) for field, name in LIMIT_FIELDS.items()}
    return {"teamID": team.team_id, "name": team.name, **limits}


def key_json(key: ApiKey) -> Json:
    """A key without the key."""
    return {
        "keyID": key.key_id,
        "teamID": key.team.team_id,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": list(key.scopes),
        "state": key.state(now_ms()),
        "createdAt": rfc3339(key.created_at_unix_ms),
        "expiresAt": _moment(key.expires_at_unix_ms),
        "lastUsedAt": _moment(key.last_used_at_unix_ms),
    }


def audit_json(entry: AuditEntry) -> Json:
    """An entry."""
    return {
        "at": rfc3339(entry.at_unix_ms),
        "requestID": entry.request_id,
        "teamID": entry.team_id,
        "actor": entry.actor,
        "action": entry.action,
        "target": entry.target,
        "status": entry.status,
        "result": entry.result,
    }


@functools.cache
def _document() -> bytes:
    return json.dumps(build_document()).encode()


def _moment(unix_ms: int | None) -> str | None:
    return None if unix_ms is None else rfc3339(unix_ms)


def _limits(body: Json) -> dict[str, int | None]:
    """The limits that the body names; null is the service's own limit."""
    limits: dict[str, int | None] = {}
    for field, name in LIMIT_FIELDS.items():
        if field not in body:
            continue
        if body[field] is None and name != "sandbox_limit":
            limits[name] = None
        else:
            limits[name] = int_field(body, field, default=-1, bounds=LIMITS[name])
            if limits[name] == -1:
                raise CallerError(f"{field} is null; it takes a whole number")
    return limits


def _whole(query: dict[str, str], name: str, *, default: int, bounds: range) -> int:
    text = query.get(name, "")
    return query_number(name, text, bounds) if text else default
