"""The routes that need snapshots, in front of a node that only pretends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from api_service import ApiService, api_service
from control_client import Client, assert_error
from falcon import testing

from vmcell_api import snapshot_catalog
from vmcell_api.store.snapshot_rows import SnapshotRows
from vmcell_api.tenancy import remove_team
from vmcell_protos.errors import CallerError, HostError

UNKNOWN = "i" + "0" * 19


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


def _made(client: Client, **body: object) -> str:
    return client.create(**body)["sandboxID"]


def _snapshot(client: Client, sandbox_id: str, name: str = "") -> str:
    answer = client("POST", f"/sandboxes/{sandbox_id}/snapshots", {"name": name} if name else {})
    assert answer.status_code == 201, answer.text
    assert answer.json["names"] == ([name] if name else [])
    return answer.json["snapshotID"]


@pytest.mark.parametrize("body", [None, {}, {"memory": True}])
def test_pause(service: ApiService, client: Client, body: object) -> None:
    sandbox_id = _made(client)
    assert client("POST", f"/sandboxes/{sandbox_id}/pause", body).status_code == 204
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/pause", body), 409, "paused already")
    assert client("GET", f"/sandboxes/{sandbox_id}").json["state"] == "paused"
    page = client("GET", "/v2/sandboxes", query_string="state=paused")
    assert [row["sandboxID"] for row in page.json] == [sandbox_id]
    assert page.headers["x-total-running"] == "0"
    assert client("GET", "/v2/sandboxes", query_string="state=running").json == []
    assert client("DELETE", f"/sandboxes/{sandbox_id}").status_code == 204
    assert service.node.running == {}
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/pause", body), 404)


@pytest.mark.parametrize("path", ["/sandboxes/{}/connect", "/v2/sandboxes/{}/connect"])
def test_connect_says_whether_it_was_paused(client: Client, path: str) -> None:
    made = client.create()
    route = path.format(made["sandboxID"])
    assert client("POST", route, {"timeout": 60}).status_code == 200
    client("POST", f"/sandboxes/{made['sandboxID']}/pause")
    answer = client("POST", route, {"timeout": 60})
    assert answer.status_code == 201
    assert answer.json == made, "the same sandbox with the same tokens"
    assert client("POST", route, {"timeout": 0}).status_code == 200


def test_resume(client: Client) -> None:
    sandbox_id = _made(client)
    route = f"/sandboxes/{sandbox_id}/resume"
    assert_error(client("POST", route, {"timeout": 15}), 409, "running already")
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    answer = client("POST", route, {"timeout": 15, "autoPause": True})
    assert (answer.status_code, answer.json["sandboxID"]) == (201, sandbox_id)
    assert_error(client("POST", f"/sandboxes/{UNKNOWN}/resume", {}), 404)


def test_a_paused_sandbox_takes_no_place_of_the_teams_limit(
    service: ApiService, client: Client
) -> None:
    from vmcell_api.store.teams import Teams

    team = service.store.ensure_team("team-one")
    Teams(service.store.engine).change_limits(team.team_id, {"sandbox_limit": 1})
    first = _made(client)
    client("POST", f"/sandboxes/{first}/pause")
    second = _made(client)
    refused = client("POST", f"/sandboxes/{first}/connect", {"timeout": 5})
    assert_error(refused, 429, "1 running sandboxes of at most 1")
    client("DELETE", f"/sandboxes/{second}")
    assert client("POST", f"/sandboxes/{first}/connect", {"timeout": 5}).status_code == 201


def test_a_resume_without_room_says_the_numbers(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    for _ in range(8):
        _made(client)
    answer = client("POST", f"/sandboxes/{sandbox_id}/connect", {"timeout": 5})
    assert_error(answer, 409, "0 of 8 places")
    assert answer.json["error_code"] == "sandbox_capacity_unavailable"
    assert client("GET", f"/sandboxes/{sandbox_id}").json["state"] == "paused"


def test_a_damaged_snapshot_is_nothing_to_try_again(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    client("POST", f"/sandboxes/{sandbox_id}/pause")

    def fail(_: str) -> None:
        raise HostError("memory of snapshot pause-1 is damaged", code="data_loss")

    service.node.on_resume = fail
    answer = client("POST", f"/v2/sandboxes/{sandbox_id}/connect", {})
    assert_error(answer, 500, "memory of snapshot pause-1 is damaged")
    assert answer.headers["should-retry"] == "false"


def test_what_a_paused_sandbox_cannot_do(client: Client) -> None:
    sandbox_id = _made(client)
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    for name, body in (
        ("timeout", {"timeout": 5}),
        ("refreshes", {"duration": 5}),
        ("snapshots", {}),
        ("fork", {"count": 1}),
        ("rollback", {"snapshotID": "snap-" + "0" * 20}),
    ):
        status = 404 if name == "rollback" else 409
        answer = client("POST", f"/sandboxes/{sandbox_id}/{name}", body)
        assert answer.status_code in (409, status), (name, answer.text)
    assert_error(client("PUT", f"/sandboxes/{sandbox_id}/network", {}), 409, "paused")
    assert_error(client("GET", f"/sandboxes/{sandbox_id}/logs"), 409, "paused")
    assert client("GET", f"/sandboxes/{sandbox_id}/metrics").json == []


def test_lifecycle_reaches_the_node_and_comes_back(service: ApiService, client: Client) -> None:
    bodies = (
        ({"autoPause": True, "autoResume": {"enabled": True}}, (True, True)),
        ({"lifecycle": {"onTimeout": "pause", "autoResume": True}}, (True, True)),
        ({"autoPause": False, "autoResume": {"enabled": False}}, (False, False)),
        ({"autoResume": {}, "lifecycle": {"onTimeout": "kill"}}, (False, False)),
        ({}, (False, False)),
    )
    for body, wanted in bodies:
        sandbox_id = _made(client, **body)
        order = service.node.orders[-1]
        assert (order.pause_on_timeout, order.auto_resume) == wanted, body
        lifecycle = client("GET", f"/sandboxes/{sandbox_id}").json["lifecycle"]
        pauses, resumes = wanted
        assert lifecycle == {"autoResume": resumes, "onTimeout": "pause" if pauses else "kill"}


@pytest.mark.parametrize(
    ("name", "body", "word"),
    [
        ("pause", {"memory": "no"}, "memory"),
        ("pause", {"memory": False}, "memory is false"),
        ("connect", {"memory": False}, "memory is false"),
        ("resume", {"memory": False}, "memory is false"),
        ("snapshots", {"memory": False}, "memory is false"),
        ("snapshots", {"name": 5}, "name"),
        ("snapshots", {"name": "Ä"}, "name"),
        ("snapshots", {"name": "x" * 300}, "name"),
        ("fork", {"count": 21}, "count"),
        ("fork", {"count": 0}, "count"),
        ("fork", {"timeout": 0}, "timeout"),
        ("fork", [], "object"),
        ("rollback", {}, "snapshotID"),
        ("rollback", {"snapshotID": ""}, "snapshotID"),
    ],
)
def test_bad_bodies(client: Client, name: str, body: object, word: str) -> None:
    sandbox_id = _made(client)
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/{name}", body), 400, word)
    assert client("GET", f"/sandboxes/{sandbox_id}").json["state"] == "running"


def test_a_pause_that_must_be_of_a_healthy_guest(client: Client) -> None:
    sandbox_id = _made(client)  # nothing listens on envd's port here
    answer = client("POST", f"/sandboxes/{sandbox_id}/pause", {"requireHealthyGuest": True})
    assert_error(answer, 409, "envd is not well")
    assert answer.json["error_code"] == "sandbox_snapshot_guest_agent_unresponsive"
    assert client("GET", f"/sandboxes/{sandbox_id}").json["state"] == "running"


def test_snapshots_are_listed_in_pages_by_sandbox_and_name(client: Client) -> None:
    one, two = _made(client), _made(client)
    made = [_snapshot(client, one, "a"), _snapshot(client, one), _snapshot(client, two, "b:v1")]
    listed = client("GET", "/snapshots").json
    assert {row["snapshotID"] for row in listed} == set(made)
    of_one = client("GET", "/snapshots", query_string=f"sandboxID={one}").json
    assert {row["snapshotID"] for row in of_one} == set(made[:2])
    named = client("GET", "/snapshots", query_string="name=team-one/b:v1").json
    assert named == [{"snapshotID": made[2], "names": ["b:v1"]}]
    assert client("GET", "/snapshots", query_string="sandboxID=x").json == []
    token, seen = "", []
    while token is not None:
        page = client("GET", "/snapshots", query_string=f"limit=1&nextToken={token}")
        seen += [row["snapshotID"] for row in page.json]
        token = page.headers.get("x-next-token")
    assert sorted(seen) == sorted(made)
    assert_error(client("GET", "/snapshots", query_string="limit=101"), 400, "limit")
    assert_error(client("GET", "/snapshots", query_string="nextToken=x"), 400, "nextToken")


def test_a_name_moves_to_the_newest_snapshot(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    first = _snapshot(client, sandbox_id, "mine")
    second = _snapshot(client, sandbox_id, "mine")
    rows = {row["snapshotID"]: row["names"] for row in client("GET", "/snapshots").json}
    assert rows == {first: [], second: ["mine"]}
    made = client("POST", "/v2/sandboxes", {"templateID": "mine", "envVars": {"A": "1"}})
    assert made.json["templateID"] == second
    order = service.node.orders[-1]
    assert (order.snapshot_id, order.environment) == (second, {"A": "1"})
    by_id = client("POST", "/v2/sandboxes", {"templateID": first})
    assert (by_id.status_code, service.node.orders[-1].snapshot_id) == (201, first)
    refused = client("POST", f"/sandboxes/{sandbox_id}/snapshots", {"name": "base"})
    assert_error(refused, 409, "name of a template")


def test_a_sandbox_of_a_snapshot_has_a_token_if_the_snapshot_had(
    service: ApiService, client: Client
) -> None:
    old = client("POST", "/sandboxes", {"templateID": "base"}).json["sandboxID"]
    for source, has_token in ((old, False), (_made(client), True)):
        snapshot_id = _snapshot(client, source)
        for route in ("/sandboxes", "/v2/sandboxes"):
            made = client("POST", route, {"templateID": snapshot_id}).json
            assert ("envdAccessToken" in made) is has_token
            assert bool(service.node.orders[-1].access_token) is has_token


def test_deleting(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    by_id = _snapshot(client, sandbox_id)
    _snapshot(client, sandbox_id, "mine")
    assert client("DELETE", f"/templates/{by_id}").status_code == 204
    assert_error(client("DELETE", f"/templates/{by_id}"), 404)
    assert client("DELETE", "/templates/team-one%2Fmine").status_code == 204
    assert service.node.saved == {}
    service.node.saved.clear()
    gone = _snapshot(client, sandbox_id)
    del service.node.saved[gone]
    assert client("DELETE", f"/templates/{gone}").status_code == 204, "only the row was left"

    held = _snapshot(client, sandbox_id)
    service.node.fail_next = None
    busy = CallerError(f"snapshot {held} is being restored; try again", code="aborted")
    service.node.fail_next = busy
    assert_error(client("DELETE", f"/templates/{held}"), 409, "being restored")
    assert client("GET", "/snapshots").json[0]["snapshotID"] == held


def test_rows_without_a_snapshot_are_dropped(
    service: ApiService, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox_id = _made(client)
    kept, lost = _snapshot(client, sandbox_id), _snapshot(client, sandbox_id)
    del service.node.saved[lost]
    rows = SnapshotRows(service.store)
    team_id = service.store.ensure_team("team-one").team_id
    assert [row["snapshotID"] for row in client("GET", "/snapshots").json] == [kept]
    assert len(rows.of_team(team_id)) == 2, "it might be in the making"
    later = snapshot_catalog.now_ms() + snapshot_catalog.LOST_AFTER_MS + 1
    monkeypatch.setattr(snapshot_catalog, "now_ms", lambda: later)
    client("GET", "/snapshots")
    assert [row.snapshot_id for row in rows.of_team(team_id)] == [kept]


def test_a_snapshot_that_fails_leaves_no_row(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)

    def fail(*arguments: object, **options: object) -> None:
        raise HostError("no space left on device")

    service.node.make_snapshot = fail  # type: ignore[method-assign]  # a fault
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/snapshots", {}), 503, "no space left")
    team_id = service.store.ensure_team("team-one").team_id
    assert SnapshotRows(service.store).of_team(team_id) == []


def test_a_team_has_so_many_snapshots(tmp_path: Path) -> None:
    with api_service(tmp_path, snapshots_per_team=2) as service:
        client = Client(service)
        sandbox_id = _made(client)
        for _ in range(2):
            _snapshot(client, sandbox_id)
        refused = client("POST", f"/sandboxes/{sandbox_id}/snapshots", {})
        assert_error(refused, 429, "2 snapshots of at most 2")


def test_forks_are_made_at_once_and_each_has_its_outcome(
    service: ApiService, client: Client
) -> None:
    sandbox_id = _made(client, metadata={"a": "b"}, allow_internet_access=False)
    together = threading.Barrier(4, timeout=20)
    numbers = iter(range(4))

    def create(order: object) -> None:
        together.wait()
        if next(numbers) == 2:
            raise HostError("no luck")

    service.node.on_create = create
    answer = client("POST", f"/vmcell/sandboxes/{sandbox_id}/fork", {"count": 4, "timeout": 60})
    assert answer.status_code == 201
    errors = [row["error"] for row in answer.json if "error" in row]
    made = [row["sandbox"] for row in answer.json if "sandbox" in row]
    assert [row["code"] for row in errors] == [500]
    assert "no luck" in errors[0]["message"]
    assert len({row["sandboxID"] for row in made}) == 3
    for row in made:
        detail = client("GET", f"/sandboxes/{row['sandboxID']}").json
        assert (detail["metadata"], detail["allowInternetAccess"]) == ({"a": "b"}, False)
    assert service.node.saved == {}
    refused = client("POST", f"/sandboxes/{sandbox_id}/fork", {"count": 5})
    assert_error(refused, 409, "room for 4 sandboxes, not for 5")


def test_rollback_undo_history_and_diff(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    base = f"/vmcell/sandboxes/{sandbox_id}"
    assert_error(client("POST", f"{base}/undo"), 400, "nothing to undo")
    first = _snapshot(client, sandbox_id, "mine")
    second = _snapshot(client, sandbox_id)
    rolled = client("POST", f"{base}/rollback", {"snapshotID": "mine"})
    assert rolled.status_code == 200
    assert rolled.json["sandboxID"] == sandbox_id
    undo = rolled.json["undo"]
    assert undo["isUndoPoint"] is True
    assert undo["expiresAt"] is not None
    assert client("POST", f"/sandboxes/{sandbox_id}/rollback", {"snapshotID": first}).json
    assert client("POST", f"{base}/undo").status_code == 200
    history = client("GET", f"{base}/snapshots").json
    assert [row["snapshotID"] for row in history][:2] == [first, second]
    assert [row["names"] for row in history][:2] == [["mine"], []]
    assert [row["parent"] for row in history][:2] == [None, first]
    assert len(history) == 5
    listed = {row["snapshotID"] for row in client("GET", "/snapshots").json}
    assert listed == {first, second}, "undo points are no templates"
    diff = client("GET", f"{base}/diff", query_string=f"older={first}&newer={second}").json
    assert (diff["changed"], diff["unchanged"]) == (["memory"], ["disk"])
    assert "files" not in diff
    query = f"older={first}&newer={second}&files=true"
    files = client("GET", f"{base}/diff", query_string=query).json["files"]
    assert files == [{"path": "/a", "change": "modified", "sizeBefore": 1, "sizeAfter": 2}]
    bad = client("GET", f"{base}/diff", query_string=query.replace("true", "1"))
    assert_error(bad, 400, "files")
    unknown = client("GET", f"{base}/diff", query_string=f"older={first}&newer=x")
    assert_error(unknown, 404, "'x' is none")
    assert_error(client("GET", f"{base}/diff"), 400, "older")


def test_rollback_to_what_is_not_the_sandboxes_own(client: Client) -> None:
    one, two = _made(client), _made(client)
    others = _snapshot(client, two, "others")
    for name in (others, "others"):
        answer = client("POST", f"/sandboxes/{one}/rollback", {"snapshotID": name})
        assert_error(answer, 404, "another sandbox")
    unknown = "snap-" + "0" * 20
    answer = client("POST", f"/sandboxes/{one}/rollback", {"snapshotID": unknown})
    assert_error(answer, 404, "not found")


def test_memory(client: Client) -> None:
    sandbox_id = _made(client)
    answer = client("GET", f"/vmcell/sandboxes/{sandbox_id}/memory")
    assert answer.json["guestMemoryBytes"] == 512 << 20
    assert answer.json["processes"][0]["own"]["pssBytes"] == 4096
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    assert_error(client("GET", f"/vmcell/sandboxes/{sandbox_id}/memory"), 409, "paused")


def test_another_teams_sandbox_and_snapshot_are_unknown(
    service: ApiService, client: Client
) -> None:
    sandbox_id = _made(client)
    snapshot_id = _snapshot(client, sandbox_id, "mine")
    stranger = Client(service, service.new_key("team-two"))
    for name in ("pause", "resume", "connect", "snapshots", "fork", "rollback"):
        body = {"snapshotID": snapshot_id} if name == "rollback" else {}
        assert_error(stranger("POST", f"/sandboxes/{sandbox_id}/{name}", body), 404)
    for name in ("snapshots", "memory", "diff?older=a&newer=b"):
        path, _, query = name.partition("?")
        answer = stranger("GET", f"/vmcell/sandboxes/{sandbox_id}/{path}", query_string=query)
        assert_error(answer, 404)
    assert stranger("GET", "/snapshots").json == []
    assert_error(stranger("DELETE", f"/templates/{snapshot_id}"), 404)
    for name in (snapshot_id, "mine", "team-one/mine"):
        assert_error(stranger("POST", "/v2/sandboxes", {"templateID": name}), 404)
    assert snapshot_id in service.node.saved


def test_a_team_goes_with_its_snapshots(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    _snapshot(client, sandbox_id)
    client("DELETE", f"/sandboxes/{sandbox_id}")
    team = service.store.ensure_team("team-one")
    with pytest.raises(CallerError, match="1 snapshots; delete them first"):
        remove_team(service.store, service.node, team, kill=False)
    remove_team(service.store, service.node, team, kill=True)
    assert service.node.saved == {}


# Requests to the ports of a paused sandbox.


def _route(service: ApiService, sandbox_id: str, **headers: str) -> testing.Result:
    return testing.TestClient(service.route_app).simulate_get(
        "/route",
        headers={"X-Original-Host": f"8080-{sandbox_id}.x", "X-Original-Uri": "/", **headers},
    )


def test_a_request_wakes_a_sandbox_that_says_so(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client, autoResume={"enabled": True})
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    answer = _route(service, sandbox_id)
    assert answer.status_code == 200
    assert answer.headers["x-vmcell-upstream"] == "127.0.0.1:8080"
    assert service.node.resumes == [sandbox_id]
    assert client("GET", f"/sandboxes/{sandbox_id}").json["state"] == "running"


def test_a_hundred_requests_wake_it_once(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client, autoResume={"enabled": True})
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    held, calls = threading.Event(), []

    def slowly(name: str) -> None:
        calls.append(name)
        assert held.wait(20)

    service.node.on_resume = slowly
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(_route, service, sandbox_id) for _ in range(100)]
        while not calls:
            assert not any(answer.done() for answer in answers)
        held.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert calls == [sandbox_id]


def test_a_request_to_a_sandbox_that_stays_paused(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client)
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    answer = _route(service, sandbox_id)
    assert answer.status_code == 403
    assert '"message":"The sandbox was not found"' in answer.headers["x-vmcell-refusal"]
    assert '"status":502' in answer.headers["x-vmcell-refusal"]
    assert service.node.resumes == []


def test_a_stranger_wakes_no_sandbox(service: ApiService, client: Client) -> None:
    made = client.create(autoResume={"enabled": True}, network={"allowPublicTraffic": False})
    client("POST", f"/sandboxes/{made['sandboxID']}/pause")
    assert '"status":403' in _route(service, made["sandboxID"]).headers["x-vmcell-refusal"]
    assert service.node.resumes == []
    token = {"E2b-Traffic-Access-Token": made["trafficAccessToken"]}
    assert _route(service, made["sandboxID"], **token).status_code == 200


def test_a_wake_that_fails_says_so(service: ApiService, client: Client) -> None:
    sandbox_id = _made(client, autoResume={"enabled": True})
    client("POST", f"/sandboxes/{sandbox_id}/pause")
    for code, status, words in (
        ("resource_exhausted", 503, "no room"),
        ("internal", 502, "could not be resumed"),
    ):
        service.node.on_resume = _raising(HostError("no luck", code=code))
        refusal = _route(service, sandbox_id).headers["x-vmcell-refusal"]
        assert f'"status":{status}' in refusal
        assert words in refusal
    service.node.on_resume = lambda name: None
    assert _route(service, sandbox_id).status_code == 200


def _raising(error: Exception):
    def fail(_: str) -> None:
        raise error

    return fail
