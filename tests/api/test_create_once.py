"""Idempotency-Key: one key and body, one sandbox, whatever happens in between."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_service import ApiService
from control_client import Client, assert_error
from falcon import testing

from vmcell_api import create_once
from vmcell_api.node_channel import NodeUnreachable
from vmcell_api.node_client import NewSandbox
from vmcell_api.store import create_keys
from vmcell_protos.errors import HostError


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


def _create(client: Client, key: str, **body: object) -> testing.Result:
    sent = {"templateID": "base", **body}
    return client("POST", "/v2/sandboxes", sent, headers={"Idempotency-Key": key})


def _assert_coded(answer: testing.Result, status: int, error_code: str) -> None:
    assert_error(answer, status)
    assert answer.json["error_code"] == error_code


def test_a_repeat_gets_the_same_sandbox(service: ApiService, client: Client) -> None:
    first = _create(client, "k-1", metadata={"a": "1", "b": "2"})
    again = _create(client, "k-1", metadata={"b": "2", "a": "1"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json == first.json
    assert len(service.node.orders) == 1
    other = _create(client, "k-2", metadata={"a": "1", "b": "2"})
    assert other.json["sandboxID"] != first.json["sandboxID"]


def test_another_body_is_a_mismatch(service: ApiService, client: Client) -> None:
    _create(client, "k-1")
    _assert_coded(_create(client, "k-1", timeout=5), 422, "idempotency_request_mismatch")
    old = client("POST", "/sandboxes", {"templateID": "base"}, headers={"Idempotency-Key": "k-1"})
    _assert_coded(old, 422, "idempotency_request_mismatch")
    assert len(service.node.orders) == 1


def test_keys_belong_to_a_team(service: ApiService, client: Client) -> None:
    stranger = Client(service, service.new_key("team-two"))
    mine, theirs = _create(client, "k-1"), _create(stranger, "k-1", timeout=7)
    assert theirs.status_code == 201
    assert mine.json["sandboxID"] != theirs.json["sandboxID"]


def test_while_it_is_being_made(service: ApiService, client: Client) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def wait(order: NewSandbox) -> None:
        asked.set()
        assert go_on.wait(20)

    service.node.on_create = wait
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(_create, client, "k-1")
        assert asked.wait(20)
        busy = _create(client, "k-1")
        go_on.set()
        made = making.result(20)
    _assert_coded(busy, 409, "idempotency_in_progress")
    assert (busy.headers["should-retry"], busy.headers["retry-after"]) == ("true", "1")
    assert _create(client, "k-1").json == made.json


def test_at_once(service: ApiService, client: Client) -> None:
    barrier = threading.Barrier(8)

    def create(_: int) -> testing.Result:
        barrier.wait(20)
        return _create(client, "k-1")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
    assert len(service.node.orders) == 1
    made = {row.json["sandboxID"] for row in answers if row.status_code == 201}
    assert made == set(service.node.running)
    for row in answers:
        if row.status_code != 201:
            _assert_coded(row, 409, "idempotency_in_progress")


def test_a_create_that_failed_may_be_repeated(service: ApiService, client: Client) -> None:
    def fail(order: NewSandbox) -> None:
        raise HostError("the guest did not boot")

    service.node.on_create = fail
    _assert_coded(_create(client, "k-1"), 500, "sandbox_create_failed")
    service.node.on_create = lambda order: None
    assert _create(client, "k-1").status_code == 201
    assert_error(_create(client, "k-3", templateID="no-such"), 404)
    assert_error(_create(client, "k-3", templateID="no-such"), 404)


def test_a_create_that_never_reached_the_node_frees_its_key(
    service: ApiService, client: Client
) -> None:
    service.node.fail_next = NodeUnreachable("noded does not answer")
    answer = _create(client, "k-1")
    assert_error(answer, 503)
    assert (answer.headers["should-retry"], answer.headers["retry-after"]) == ("true", "1")
    assert _create(client, "k-1").status_code == 201


def test_a_create_whose_outcome_nobody_knows(
    service: ApiService, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """noded went away: it may have been made. Not before it can be ruled out is it made again."""

    def vanish(order: NewSandbox) -> None:
        raise NodeUnreachable("noded does not answer")

    service.node.on_create = vanish
    assert_error(_create(client, "k-1"), 503)
    service.node.on_create = lambda order: None
    _assert_coded(_create(client, "k-1"), 409, "idempotency_in_progress")
    later = create_once.now_ms() + service.config.start_timeout_s * 1000 + 61_000
    monkeypatch.setattr(create_once, "now_ms", lambda: later)
    made = _create(client, "k-1")
    assert made.status_code == 201
    assert _create(client, "k-1").json == made.json
    assert len(service.node.running) == 1


def test_a_sandbox_that_was_made_after_all_is_found(service: ApiService, client: Client) -> None:
    """The node made it and its answer was lost."""
    lose = service.node.create

    def made_and_lost(order: NewSandbox) -> object:
        lose(order)
        raise NodeUnreachable("noded does not answer")

    service.node.create = made_and_lost  # type: ignore[method-assign]
    assert_error(_create(client, "k-1"), 503)
    (sandbox_id,) = service.node.running
    assert _create(client, "k-1").json["sandboxID"] == sandbox_id


def test_a_key_whose_sandbox_has_ended(service: ApiService, client: Client) -> None:
    sandbox_id = _create(client, "k-1").json["sandboxID"]
    assert client("DELETE", f"/sandboxes/{sandbox_id}").status_code == 204
    answer = _create(client, "k-1")
    _assert_coded(answer, 409, "sandbox_create_refused")
    assert "should-retry" not in answer.headers
    assert not service.node.running


def test_keys_are_forgotten_after_a_day(
    service: ApiService, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _create(client, "k-1")
    later = create_keys.now_ms() + create_keys.KEPT_MS + 1
    monkeypatch.setattr(create_keys, "now_ms", lambda: later)
    second = _create(client, "k-1")
    assert second.status_code == 201
    assert second.json["sandboxID"] != first.json["sandboxID"]


@pytest.mark.parametrize("key", ["", "UPPER", "a b", "ä", "a" * 256, "a_b"])
def test_keys_of_another_form(service: ApiService, client: Client, key: str) -> None:
    assert_error(_create(client, key), 400, "Idempotency-Key")
    assert not service.node.orders


def test_the_longest_key(client: Client) -> None:
    assert _create(client, "a" * 255).status_code == 201
