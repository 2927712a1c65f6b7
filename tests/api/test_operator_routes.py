"""The operators' routes: teams, keys and audit with the scope admin."""

from __future__ import annotations

import pytest
from api_service import ApiService
from falcon import testing


class Operator:
    def __init__(self, service: ApiService) -> None:
        self._client = testing.TestClient(service.app)
        self._key = service.new_key("operators", "admin")

    def __call__(self, method: str, path: str, body: object = None, **options: str):
        headers = {"X-API-KEY": options.pop("key", self._key)}
        return self._client.simulate_request(method, path, headers=headers, json=body, **options)


@pytest.fixture
def operator(service: ApiService) -> Operator:
    return Operator(service)


def test_a_team_from_its_making_to_its_end(service: ApiService, operator: Operator) -> None:
    made = operator("POST", "/vmcell/teams", {"name": "new", "sandboxLimit": 1, "maxTimeout": 60})
    assert made.status_code == 201
    assert made.json["requestsPerSecond"] is None
    assert operator("POST", "/vmcell/teams", {"name": "new"}).status_code == 409
    changed = operator("PATCH", "/vmcell/teams/new", {"maxTimeout": None, "requestsPerSecond": 9})
    assert changed.json == {**made.json, "maxTimeout": None, "requestsPerSecond": 9}
    key = operator("POST", "/vmcell/teams/new/keys", {"name": "ci", "expiresIn": 3600})
    assert key.status_code == 201
    shown = key.json
    secret = shown.pop("key")
    assert operator("GET", "/vmcell/teams/new/keys").json == [shown]
    assert operator("POST", "/v2/sandboxes", {"templateID": "base"}, key=secret).status_code == 201
    answer = operator("DELETE", "/vmcell/teams/new")
    assert answer.status_code == 400
    assert "1 running" in answer.json["message"]
    (row,) = [row for row in operator("GET", "/vmcell/teams").json if row["name"] == "new"]
    assert (row["keyCount"], row["sandboxCount"]) == (1, 1)
    service.node.running.clear()
    assert operator("DELETE", f"/vmcell/teams/{made.json['teamID']}").status_code == 204
    assert operator("GET", "/vmcell/teams/new/keys").status_code == 404
    assert operator("GET", "/v2/sandboxes", key=secret).status_code == 401


def test_keys_are_renewed_and_revoked(operator: Operator) -> None:
    made = operator("POST", "/vmcell/teams/team-one/keys", {"scopes": ["sandboxes:*"]}).json
    fresh = operator("POST", f"/vmcell/keys/{made['keyID']}/rotate", {"grace": 60})
    assert fresh.status_code == 201
    assert fresh.json["scopes"] == ["sandboxes:*"]
    for key in (made["key"], fresh.json["key"]):
        assert operator("GET", "/v2/sandboxes", key=key).status_code == 200
    assert operator("DELETE", f"/vmcell/keys/{made['keyID']}").status_code == 204
    assert operator("GET", "/v2/sandboxes", key=made["key"]).status_code == 401
    assert operator("GET", "/v2/sandboxes", key=fresh.json["key"]).status_code == 200
    again = operator("POST", f"/vmcell/keys/{made['keyID']}/rotate", {})
    assert again.status_code == 400
    assert "revoked" in again.json["message"]


def test_audit_answers_questions(service: ApiService, operator: Operator) -> None:
    operator("POST", "/vmcell/teams", {"name": "new"})
    operator("GET", "/v2/sandboxes", key=service.new_key("team-one", "team:read"))
    told = operator("GET", "/vmcell/audit").json
    assert [row["action"] for row in told] == ["GET /v2/sandboxes", "POST /vmcell/teams"]
    (refused,) = operator("GET", "/vmcell/audit", query_string="result=permission_denied").json
    assert refused["status"] == 403
    assert operator("GET", "/vmcell/audit", query_string="since=99999999999").json == []
    assert len(operator("GET", "/vmcell/audit", query_string="limit=1").json) == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "word"),
    [
        ("POST", "/vmcell/teams", {}, "name"),
        ("POST", "/vmcell/teams", {"name": "a/b"}, "team name"),
        ("POST", "/vmcell/teams", {"name": "a", "sandboxLimit": None}, "sandboxLimit"),
        ("POST", "/vmcell/teams", {"name": "a", "maxTimeout": 0}, "maxTimeout"),
        ("PATCH", "/vmcell/teams/team-one", {"requestsPerSecond": True}, "requestsPerSecond"),
        ("POST", "/vmcell/teams/team-one/keys", {"scopes": "admin"}, "scopes"),
        ("POST", "/vmcell/teams/team-one/keys", {"scopes": []}, "scope"),
        ("POST", "/vmcell/teams/team-one/keys", {"scopes": ["all"]}, "'all'"),
        ("POST", "/vmcell/teams/team-one/keys", {"name": 5}, "name"),
        ("POST", "/vmcell/teams/team-one/keys", {"name": "a\nb"}, "name"),
        ("POST", "/vmcell/teams/team-one/keys", {"expiresIn": -1}, "expiresIn"),
        ("POST", "/vmcell/keys/k1/rotate", {"grace": 1 << 40}, "grace"),
    ],
)
def test_bad_bodies_change_nothing(
    operator: Operator, method: str, path: str, body: object, word: str
) -> None:
    before = operator("GET", "/vmcell/teams").json
    answer = operator(method, path, body)
    assert answer.status_code == 400
    assert word in answer.json["message"]
    assert operator("GET", "/vmcell/teams").json == before


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "since=-1", "since=1e9"])
def test_bad_questions(operator: Operator, query: str) -> None:
    answer = operator("GET", "/vmcell/audit", query_string=query)
    assert answer.status_code == 400
    assert query.split("=")[0] in answer.json["message"]


def test_what_is_not_there(operator: Operator) -> None:
    for method, path in (
        ("PATCH", "/vmcell/teams/nobody"),
        ("DELETE", "/vmcell/teams/nobody"),
        ("GET", "/vmcell/teams/nobody/keys"),
        ("POST", "/vmcell/teams/nobody/keys"),
        ("POST", "/vmcell/keys/k0/rotate"),
        ("DELETE", "/vmcell/keys/k0"),
    ):
        assert operator(method, path, {}).status_code == 404, path
