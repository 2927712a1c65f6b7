"""What needs snapshots is refused by name, after the sandbox was looked for."""

from __future__ import annotations

import pytest
from api_service import ApiService
from control_client import Client, assert_error


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("pause", None),
        ("pause", {}),
        ("pause", {"memory": False, "requireHealthyGuest": True}),
        ("snapshots", {"name": "mine"}),
        ("fork", {"count": 2}),
        ("rollback", {"snapshotID": "x"}),
    ],
)
def test_refused_by_name(client: Client, name: str, body: object) -> None:
    sandbox_id = client.create()["sandboxID"]
    answer = client("POST", f"/sandboxes/{sandbox_id}/{name}", body)
    assert_error(answer, 501, name, "does not have")
    assert answer.headers["should-retry"] == "false"
    assert client("GET", f"/sandboxes/{sandbox_id}").json["state"] == "running"
    unknown = "i" + "0" * 19
    assert_error(client("POST", f"/sandboxes/{unknown}/{name}", body), 404, "was not found")


def test_a_running_sandbox_is_not_resumed(client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    answer = client("POST", f"/sandboxes/{sandbox_id}/resume", {"timeout": 15})
    assert_error(answer, 409, "running")
    assert_error(client("POST", f"/sandboxes/{'i' + '0' * 19}/resume", {}), 404)


def test_there_are_no_snapshots(client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    for query in ("", f"sandboxID={sandbox_id}", "name=x&limit=5"):
        answer = client("GET", "/snapshots", query_string=query)
        assert answer.json == []
        assert "x-next-token" not in answer.headers
    assert_error(client("GET", "/snapshots", query_string="limit=101"), 400, "limit")
    assert_error(client("GET", "/snapshots", query_string="nextToken=x"), 400, "nextToken")


@pytest.mark.parametrize(
    ("name", "body"), [("pause", {"memory": "no"}), ("fork", {"count": 21}), ("fork", [])]
)
def test_bad_bodies(client: Client, name: str, body: object) -> None:
    sandbox_id = client.create()["sandboxID"]
    assert_error(client("POST", f"/sandboxes/{sandbox_id}/{name}", body), 400)


def test_another_teams_sandbox_is_unknown(service: ApiService, client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    stranger = Client(service, service.new_key("team-two"))
    for name in ("pause", "resume", "snapshots", "fork", "rollback"):
        assert_error(stranger("POST", f"/sandboxes/{sandbox_id}/{name}", {}), 404)
