"""The control plane's routes with a fake node: statuses, bodies, tenants, refusals."""

from __future__ import annotations

import datetime
import sqlite3
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from api_service import ApiService, api_service
from control_client import Client, assert_error
from falcon import testing

from vmcell_api.egress import CLOSED
from vmcell_api.node_channel import NodeUnreachable
from vmcell_protos.errors import CallerError, HostError


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


def test_create_v2_hands_everything_to_the_node(service: ApiService, client: Client) -> None:
    answer = client.create(
        timeout=77, metadata={"a": "b"}, envVars={"X": "1"}, allow_internet_access=False
    )
    assert answer["envdVersion"]
    assert answer["clientID"]
    (order,) = service.node.orders
    assert order.sandbox_id == answer["sandboxID"]
    assert order.access_token == answer["envdAccessToken"]
    assert len(order.access_token) == 64
    assert (order.timeout_s, order.environment, order.egress) == (77, {"X": "1"}, CLOSED)
    assert order.image == "docker.io/vmcell/base:latest"
    detail = client("GET", f"/sandboxes/{answer['sandboxID']}").json
    assert detail["metadata"] == {"a": "b"}
    assert detail["allowInternetAccess"] is False
    assert detail["state"] == "running"
    assert detail["envdAccessToken"] == answer["envdAccessToken"]
    assert {type(detail[name]) for name in ("cpuCount", "memoryMB", "diskSizeMB")} == {int}


def test_a_sandbox_that_was_made_is_answered_though_the_store_fails_then(
    service: ApiService, client: Client
) -> None:
    """The row with its owner is there; nobody would learn the id of what runs otherwise."""
    with sqlite3.connect(service.config.database_url.removeprefix("sqlite:///")) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON sandboxes "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    connection.close()
    made = client.create()
    assert [row["sandboxID"] for row in client("GET", "/v2/sandboxes").json] == [made["sandboxID"]]
    assert client("DELETE", f"/sandboxes/{made['sandboxID']}").status_code == 204


def test_defaults_of_the_two_create_versions(service: ApiService, client: Client) -> None:
    client.create()
    old = client("POST", "/sandboxes", {"templateID": "small"})
    assert old.status_code == 201
    assert "envdAccessToken" not in old.json
    secure = client("POST", "/sandboxes", {"templateID": "small", "secure": True})
    assert secure.json["envdAccessToken"]
    assert [order.timeout_s for order in service.node.orders] == [300, 15, 15]
    assert service.node.orders[1].access_token == ""


def test_a_timeout_without_an_end(client: Client) -> None:
    """cubesandbox's -1; noded's longest is 400 days."""
    answer = client.create(timeout=-1)
    left = _end_at(client, answer["sandboxID"]) - datetime.datetime.now(datetime.UTC)
    assert left > datetime.timedelta(days=399)


def test_a_server_that_ends_every_sandbox_refuses_to_keep_one(tmp_path: Path) -> None:
    with api_service(tmp_path, allow_no_end=False) as service:
        body = {"templateID": "base", "timeout": -1}
        assert_error(Client(service)("POST", "/v2/sandboxes", body), 400, "86400")


def test_an_imported_image_is_a_template_too(service: ApiService, client: Client) -> None:
    answer = client("POST", "/v2/sandboxes", {"templateID": "docker.io/x/y:1"})
    assert answer.status_code == 201
    assert service.node.orders[0].image == "docker.io/x/y:1"
    assert_error(
        client("POST", "/v2/sandboxes", {"templateID": "nothing"}), 404, "template", "nothing"
    )
    assert len(client("GET", "/v2/sandboxes").json) == 1


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "templateID"),
        ({"templateID": 5}, "templateID"),
        ({"templateID": ""}, "templateID"),
        ({"templateID": "base", "timeout": "9"}, "timeout"),
        ({"templateID": "base", "timeout": True}, "timeout"),
        ({"templateID": "base", "timeout": 0}, "timeout"),
        ({"templateID": "base", "timeout": -2}, "timeout"),
        ({"templateID": "base", "timeout": -1.0}, "timeout"),
        ({"templateID": "base", "timeout": 86401}, "timeout"),
        ({"templateID": "base", "timeout": 1.5}, "timeout"),
        ({"templateID": "base", "metadata": {"a": 1}}, "metadata"),
        ({"templateID": "base", "metadata": []}, "metadata"),
        ({"templateID": "base", "envVars": {"A=B": "x"}}, "envVars"),
        ({"templateID": "base", "envVars": {"A": "x\0"}}, "NUL"),
        ({"templateID": "base", "envVars": {"A": "\ud800"}}, "Unicode"),
        ({"templateID": "base", "allow_internet_access": "yes"}, "allow_internet_access"),
        ({"templateID": "base", "autoPause": "yes"}, "autoPause"),
        ({"templateID": "base", "autoResume": {"enabled": 1}}, "autoResume.enabled"),
        (
            {
                "templateID": "base",
                "autoPause": True,
                "volumeMounts": [{"name": "v", "path": "/v"}],
            },
            "autoPause and volumeMounts",
        ),
        ({"templateID": "base", "mcp": {"x": {}}}, "mcp"),
        ({"templateID": "base", "volumeMounts": [{"name": "v"}]}, "volumeMounts"),
        ({"templateID": "base", "iam": {"tokens": {}}}, "iam"),
        ({"templateID": "base", "lifecycle": {"onTimeout": "sleep"}}, "lifecycle.onTimeout"),
        ({"templateID": "base", "lifecycle": {"autoResume": "yes"}}, "autoResume"),
        ({"templateID": "base", "lifecycle": "kill"}, "lifecycle"),
        ({"templateID": "base", "autoResume": 1}, "autoResume"),
        ({"templateID": "base", "autoPauseMemory": False}, "autoPauseMemory"),
        ({"templateID": "base", "distributionScope": ["a"]}, "distributionScope"),
        ({"templateID": "base", "metadata": {str(i): "" for i in range(10001)}}, "values"),
    ],
)
def test_bad_create_is_refused_by_name(
    service: ApiService, client: Client, body: dict, word: str
) -> None:
    assert_error(client("POST", "/v2/sandboxes", body), 400, word)
    assert not service.node.orders
    assert not service.store.sandboxes(team_id=service.store.ensure_team("team-one").team_id)


def test_options_that_ask_for_nothing_are_fine(client: Client) -> None:
    client.create(
        autoPause=False,
        autoPauseMemory=True,
        autoResume={"enabled": False},
        distributionScope=[],
        mcp=None,
        volumeMounts=[],
        network={"allowPublicTraffic": True, "allowOut": []},
        lifecycle={"onTimeout": "kill", "autoResume": False},
        unknown_field=7,
    )


@pytest.mark.parametrize("data", ["[1]", "{", '"x"', "[" * 100000, '{"a": NaN}', "\xff"])
def test_bodies_that_are_no_object(client: Client, data: str) -> None:
    assert_error(client("POST", "/v2/sandboxes", data.encode("latin-1")), 400, "body")


def test_deep_and_large_bodies(client: Client) -> None:
    deep: object = {}
    for _ in range(40):
        deep = {"x": deep}
    assert_error(client("POST", "/v2/sandboxes", deep), 400, "nested")
    assert_error(client("POST", "/v2/sandboxes", {"x": "y" * (1 << 20)}), 413, "1048576")


def test_another_teams_sandbox_is_unknown(service: ApiService, client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    stranger = Client(service, service.new_key("team-two"))
    calls = [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/timeout", {"timeout": 5}),
        ("POST", "/connect", {"timeout": 5}),
        ("POST", "/refreshes", {"duration": 5}),
    ]
    for method, tail, body in calls:
        assert_error(stranger(method, f"/sandboxes/{sandbox_id}{tail}", body), 404)
    assert stranger("GET", "/v2/sandboxes").json == []
    assert client("GET", f"/sandboxes/{sandbox_id}").status_code == 200


def test_kill_once(client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    assert client("DELETE", f"/sandboxes/{sandbox_id}").status_code == 204
    assert_error(client("DELETE", f"/sandboxes/{sandbox_id}"), 404, "was not found")
    assert_error(client("GET", f"/sandboxes/{sandbox_id}"), 404)


def test_the_joined_id_of_old_sdks(client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    joined = f"/sandboxes/{sandbox_id}-vmcell"
    for path in ("", "/metrics", "/logs"):
        assert client("GET", joined + path).status_code == 200
    assert client("PUT", joined + "/network", {}).status_code == 204
    assert client("POST", joined + "/timeout", {"timeout": 60}).status_code == 204
    assert client("POST", joined + "/connect", {"timeout": 60}).status_code == 200
    assert client("POST", joined + "/refreshes", {"duration": 60}).status_code == 204
    assert_error(client("GET", "/sandboxes/..%2f..%2fetc"), 404)
    assert_error(client("GET", "/sandboxes/" + "a" * 5000), 404)


def _end_at(client: Client, sandbox_id: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(client("GET", f"/sandboxes/{sandbox_id}").json["endAt"])


def test_timeouts(client: Client) -> None:
    sandbox_id = client.create(timeout=300)["sandboxID"]
    first = _end_at(client, sandbox_id)
    assert client("POST", f"/sandboxes/{sandbox_id}/timeout", {"timeout": 10}).status_code == 204
    assert _end_at(client, sandbox_id) < first - datetime.timedelta(seconds=200)
    for path in ("/sandboxes", "/v2/sandboxes"):
        answer = client("POST", f"{path}/{sandbox_id}/connect", {"timeout": 1})
        assert answer.status_code == 200
        assert answer.json["sandboxID"] == sandbox_id
    shortened = _end_at(client, sandbox_id)
    assert client("POST", f"/sandboxes/{sandbox_id}/connect", {"timeout": 900}).status_code == 200
    extended = _end_at(client, sandbox_id)
    assert extended > shortened + datetime.timedelta(seconds=800)
    path = f"/sandboxes/{sandbox_id}/refreshes"
    assert client("POST", path, {"duration": 3600}).status_code == 204
    assert _end_at(client, sandbox_id) > extended
    assert_error(client("POST", path, {"duration": 3601}), 400, "duration")
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/timeout", {}), 400, "timeout")
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/timeout", {"timeout": -1}), 400)
    unknown = "i" + "0" * 19
    assert_error(client("POST", f"/sandboxes/{unknown}/timeout", {"timeout": 1}), 404)


def test_list_pages_in_both_orders(client: Client) -> None:
    ids = [client.create()["sandboxID"] for _ in range(7)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        found: list[str] = []
        token = ""
        while True:
            query = urlencode({"limit": 3, "order": order, "nextToken": token})
            answer = client("GET", "/v2/sandboxes", query_string=query)
            found += [entry["sandboxID"] for entry in answer.json]
            assert answer.headers["x-total-running"] == "7"
            token = answer.headers.get("x-next-token", "")
            if not token:
                break
        assert found == expected
    assert len(client("GET", "/sandboxes").json) == 7


def test_list_filters(client: Client) -> None:
    one = client.create(metadata={"k": "v w", "é&=": "%"})["sandboxID"]
    two = client.create(metadata={"k": "other"}, templateID="small")["sandboxID"]

    def ids(**query: str) -> list[str]:
        answer = client("GET", "/v2/sandboxes", query_string=urlencode(query))
        assert answer.status_code == 200
        return [entry["sandboxID"] for entry in answer.json]

    assert ids(metadata=urlencode({quote("k"): quote("v w")})) == [one]
    assert ids(metadata=urlencode({quote("é&="): quote("%"), "k": quote("v w")})) == [one]
    assert ids(metadata="k=nothing") == []
    assert ids(template="small") == [two]
    assert ids(state="paused") == []
    assert ids(state="running,paused") == [two, one]
    assert ids(startedAfter="2001-01-01T00:00:00Z") == [two, one]
    assert ids(startedAfter="2099-01-01T00:00:00Z") == []
    assert ids(startedAfter="2001-01-01T00:00:00.123456789+01:00") == [two, one]
    version_1 = client("GET", "/sandboxes", query_string=urlencode({"metadata": "k=other"}))
    assert [entry["sandboxID"] for entry in version_1.json] == [two]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "order=up", "state=dead", "nextToken=!!",
              "nextToken=YWJj", "startedAfter=yesterday"]
)  # fmt: skip
def test_bad_list_queries(client: Client, query: str) -> None:
    assert_error(client("GET", "/v2/sandboxes", query_string=query), 400, query.split("=")[0])


def test_keys(service: ApiService) -> None:
    anonymous = testing.TestClient(service.app)
    assert_error(anonymous.simulate_get("/v2/sandboxes"), 401)
    for wrong in ("e2b_" + "0" * 40, "x", "e2b_zz", "é"):
        headers = {"X-API-KEY": wrong}
        assert_error(anonymous.simulate_get("/v2/sandboxes", headers=headers), 401)
    bearer = {"Authorization": f"Bearer {service.key}"}
    assert anonymous.simulate_get("/v2/sandboxes", headers=bearer).status_code == 200
    assert anonymous.simulate_get("/health").json == {"status": "ok"}


def test_no_route_no_method(client: Client) -> None:
    assert_error(client("GET", "/nothing"), 404, "/nothing")
    answer = client("PUT", "/v2/sandboxes")
    assert_error(answer, 405, "PUT")
    assert "POST" in answer.headers["allow"]


def test_cors(service: ApiService, client: Client) -> None:
    anonymous = testing.TestClient(service.app)
    headers = {
        "Origin": "http://a",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }
    answer = anonymous.simulate_options("/v2/sandboxes", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-api-key" in answer.headers["access-control-allow-headers"]
    listed = client("GET", "/v2/sandboxes", headers={"Origin": "http://a"})
    assert "X-Next-Token" in listed.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (HostError("boot failed"), 500, False),
        (HostError("broken", code="internal"), 500, False),
        (HostError("too slow", code="deadline_exceeded"), 504, False),
        (HostError("no slot", code="resource_exhausted"), 503, True),
        (NodeUnreachable("no noded"), 503, True),
        (CallerError("bad image", code="failed_precondition"), 400, False),
        (CallerError("twice", code="already_exists"), 409, False),
    ],
)
def test_errors_of_the_node(
    service: ApiService, client: Client, error: Exception, status: int, retry: bool
) -> None:
    def fail(order: object) -> None:
        raise error

    service.node.on_create = fail
    answer = client("POST", "/v2/sandboxes", {"templateID": "base"})
    assert_error(answer, status, str(error))
    if status >= 500:
        assert ("retry-after" in answer.headers) is retry
        assert (answer.headers.get("should-retry") == "false") is not retry


def test_a_bug_is_a_500_without_its_trace(service: ApiService, client: Client) -> None:
    def fail(order: object) -> None:
        raise ZeroDivisionError("secret detail")

    service.node.on_create = fail
    answer = client("POST", "/v2/sandboxes", {"templateID": "base"})
    assert_error(answer, 500)
    assert "secret" not in answer.text


def test_the_teams_limit(service: ApiService, client: Client) -> None:
    team = service.store.ensure_team("team-one")
    first = client.create()["sandboxID"]
    for _ in range(team.sandbox_limit - 1):
        client.create()
    answer = client("POST", "/v2/sandboxes", {"templateID": "base"})
    assert_error(answer, 429, str(team.sandbox_limit))
    assert answer.headers["should-retry"] == "false"
    client("DELETE", f"/sandboxes/{first}")
    client.create()


def test_a_chunked_body_without_a_length(service: ApiService) -> None:
    environ = testing.create_environ(
        path="/v2/sandboxes", method="POST", headers={"X-API-KEY": service.key}
    )
    import io

    environ.pop("CONTENT_LENGTH", None)
    environ["wsgi.input"] = io.BytesIO(b'{"templateID": "base"}')
    environ["wsgi.input_terminated"] = True
    start = testing.StartResponseMock()
    list(service.app(environ, start))
    assert start.status == "201 Created"
