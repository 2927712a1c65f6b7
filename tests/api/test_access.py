"""Keys, scopes, limits and audit of requests, over HTTP's words, with a fake node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service
from falcon import testing

from vmcell_api.app import create_app
from vmcell_api.store.api_keys import ApiKeys
from vmcell_api.store.audit import Audit, AuditEntry, AuditQuery
from vmcell_api.store.database import open_engine
from vmcell_api.store.records import Store
from vmcell_api.store.teams import Teams
from vmcell_api.tenancy import create_key
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.token import load_tokens


def _ask(
    service: ApiService, method: str, path: str, key: str, body: object = None
) -> testing.Result:
    client = testing.TestClient(service.app)
    headers = {"X-API-KEY": key}
    return client.simulate_request(method, path, headers=headers, json=body)


def _audit(service: ApiService, **query: object) -> list[AuditEntry]:
    return Audit(service.store.engine).find(AuditQuery(**query))  # type: ignore[arg-type]  # test fields


def test_scopes_hold_for_every_call(service: ApiService) -> None:
    reader = service.new_key("team-one", "sandboxes:read")
    writer = service.new_key("team-one", "sandboxes:write")
    body = {"templateID": "base"}
    refused = _ask(service, "POST", "/v2/sandboxes", reader, body)
    assert refused.status_code == 403
    assert "sandboxes:write" in refused.json["message"]
    assert not service.node.orders
    assert _ask(service, "POST", "/v2/sandboxes", writer, body).status_code == 201
    assert len(_ask(service, "GET", "/v2/sandboxes", reader).json) == 1
    assert _ask(service, "GET", "/v2/sandboxes", writer).status_code == 403
    assert _ask(service, "GET", "/teams", reader).status_code == 403
    assert _ask(service, "GET", "/vmcell/teams", service.key).status_code == 403
    (entry,) = _audit(service, result="permission_denied", action="POST")
    assert entry.actor.startswith("key k")
    assert entry.status == 403


def test_a_revoked_key_is_refused_by_every_worker_at_once(service: ApiService) -> None:
    key, record = create_key(service.store, service.store.ensure_team("team-one"), scopes=["*"])
    other = Store(open_engine(service.config.database_url))
    tokens = load_tokens(VolumeFolders(service.config.volumes_dir).key_path)
    another = create_app(other, service.node, service.config, volume_tokens=tokens)
    apps = [service.app, another]
    clients = [testing.TestClient(app, headers={"X-API-KEY": key}) for app in apps]
    for _ in range(3):
        assert [client.simulate_get("/v2/sandboxes").status_code for client in clients] == [200] * 2
    ApiKeys(service.store.engine).revoke(record.key_id)
    answers = [client.simulate_get("/v2/sandboxes") for client in clients]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert f"{record.key_id} is revoked" in answers[0].json["message"]
    assert {row.result for row in _audit(service, actor=f"key {record.key_id}")} == {
        "unauthenticated"
    }
    other.close()


def test_an_expired_key(service: ApiService) -> None:
    key, record = create_key(
        service.store, service.store.ensure_team("team-one"), scopes=["*"], life_s=1000
    )
    assert _ask(service, "GET", "/v2/sandboxes", key).status_code == 200
    ApiKeys(service.store.engine).replace(record.key_id, "h" * 64, prefix="e2b_", grace_ms=0)
    answer = _ask(service, "GET", "/v2/sandboxes", key)
    assert answer.status_code == 401
    assert "is expired" in answer.json["message"]


def test_the_last_use_is_noted(service: ApiService) -> None:
    keys = ApiKeys(service.store.engine)
    assert [key.last_used_at_unix_ms for key in keys.list()] == [None]
    _ask(service, "GET", "/v2/sandboxes", service.key)
    (first,) = keys.list()
    assert first.last_used_at_unix_ms
    _ask(service, "GET", "/v2/sandboxes", service.key)
    assert keys.list() == [first], "at most once a minute"


def test_a_teams_own_limits(service: ApiService) -> None:
    teams = Teams(service.store.engine)
    team = teams.find("team-one")
    teams.change_limits(team.team_id, {"sandbox_limit": 1, "max_timeout_s": 60})
    body = {"templateID": "base", "timeout": 61}
    answer = _ask(service, "POST", "/v2/sandboxes", service.key, body)
    assert answer.status_code == 400
    assert "1 to 60" in answer.json["message"]
    made = _ask(service, "POST", "/v2/sandboxes", service.key, {"templateID": "base"})
    assert made.status_code == 201
    assert service.node.orders[0].timeout_s == 60, "the default is no more than the limit"
    path = f"/sandboxes/{made.json['sandboxID']}"
    for tail, field in (("timeout", "timeout"), ("connect", "timeout"), ("refreshes", "duration")):
        refused = _ask(service, "POST", f"{path}/{tail}", service.key, {field: 61})
        assert refused.status_code == 400, tail
        good = _ask(service, "POST", f"{path}/{tail}", service.key, {field: 60})
        assert good.status_code in (200, 204), tail
    assert (
        _ask(service, "POST", "/v2/sandboxes", service.key, {"templateID": "base"}).status_code
        == 429
    )


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[ApiService]:
    with api_service(tmp_path, requests_per_s=2) as running:
        yield running


def test_the_rate(slow: ApiService) -> None:
    answers = [_ask(slow, "GET", "/v2/sandboxes", slow.key) for _ in range(8)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:4] == [200] * 4
    assert 429 in statuses
    refused = answers[statuses.index(429)]
    assert refused.json["code"] == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["should-retry"] == "true"
    assert _ask(slow, "GET", "/v2/sandboxes", slow.new_key("team-two")).status_code == 200
    assert _ask(slow, "GET", "/health", "").status_code == 200
    team = Teams(slow.store.engine).find("team-one")
    Teams(slow.store.engine).change_limits(team.team_id, {"requests_per_s": 1000})
    assert _ask(slow, "GET", "/v2/sandboxes", slow.key).status_code == 200, "holds at once"
    assert not _audit(slow, result="resource_exhausted")


def test_a_revoked_key_does_not_use_up_its_teams_rate(slow: ApiService) -> None:
    key, record = create_key(slow.store, slow.store.ensure_team("team-one"), scopes=["*"])
    ApiKeys(slow.store.engine).revoke(record.key_id)
    statuses = {_ask(slow, "GET", "/v2/sandboxes", key).status_code for _ in range(12)}
    assert statuses == {401, 429}
    assert _ask(slow, "GET", "/v2/sandboxes", slow.key).status_code == 200


def test_what_is_audited(service: ApiService) -> None:
    made = _ask(service, "POST", "/v2/sandboxes", service.key, {"templateID": "base"})
    sandbox_id = made.json["sandboxID"]
    _ask(service, "GET", f"/sandboxes/{sandbox_id}", service.key)
    _ask(service, "POST", f"/sandboxes/{sandbox_id}/timeout", service.key, {"timeout": 9})
    killed = _ask(service, "DELETE", f"/sandboxes/{sandbox_id}", service.key)
    _ask(service, "DELETE", f"/sandboxes/{sandbox_id}", service.key)
    _ask(service, "POST", "/v2/sandboxes", "e2b_" + "0" * 40, {"templateID": "base"})
    told = [(row.action, row.target, row.status, row.result) for row in _audit(service)]
    assert told == [
        ("DELETE /sandboxes/{sandbox_id}", sandbox_id, 404, "not_found"),
        ("DELETE /sandboxes/{sandbox_id}", sandbox_id, 204, "ok"),
        ("POST /sandboxes/{sandbox_id}/timeout", sandbox_id, 204, "ok"),
        ("POST /v2/sandboxes", sandbox_id, 201, "ok"),
    ]
    entries = _audit(service)
    assert entries[1].request_id == killed.headers["x-request-id"]
    assert {row.team_id for row in entries} == {
        Teams(service.store.engine).find("team-one").team_id
    }


def test_an_audit_that_cannot_be_written_does_not_undo_the_answer(service: ApiService) -> None:
    with service.store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE audit")
    made = _ask(service, "POST", "/v2/sandboxes", service.key, {"templateID": "base"})
    assert made.status_code == 201


def test_the_cli_learns_its_team(service: ApiService) -> None:
    client = testing.TestClient(service.app)
    answer = client.simulate_get("/teams", headers={"Authorization": f"Bearer {service.key}"})
    (team,) = answer.json
    assert team["name"] == "team-one"
    assert team["apiKey"] == service.key
    assert team["isDefault"] is True
