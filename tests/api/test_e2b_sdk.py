"""The unmodified E2B SDK against the API with a fake node, over loopback."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import pytest
from api_service import ApiService, listening
from e2b import NotFoundException, Sandbox, SandboxQuery, SandboxState
from e2b.exceptions import AuthenticationException, RateLimitException, SandboxException

from vmcell_protos.errors import HostError


@pytest.fixture
def sdk(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with listening(service.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_SANDBOX_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("E2B_API_KEY", service.key)
        yield service


def test_create_look_extend_kill(sdk: ApiService) -> None:
    sandbox = Sandbox.create(
        template="small", timeout=120, metadata={"who": "me & you"}, envs={"A": "b"}
    )
    (order,) = sdk.node.orders
    assert order.sandbox_id == sandbox.sandbox_id
    assert order.environment == {"A": "b"}
    info = sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id
    assert info.template_id == "small"
    assert info.metadata == {"who": "me & you"}
    assert info.state == SandboxState.RUNNING
    left = info.end_at - datetime.datetime.now(datetime.UTC)
    assert 100 < left.total_seconds() <= 120
    sandbox.set_timeout(600)
    extended = Sandbox.get_info(sandbox.sandbox_id).end_at
    assert extended > info.end_at + datetime.timedelta(seconds=400)
    again = Sandbox.connect(sandbox.sandbox_id, timeout=30)
    assert again.sandbox_id == sandbox.sandbox_id
    assert Sandbox.get_info(sandbox.sandbox_id).end_at == extended, "connect never shortens"
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    with pytest.raises(NotFoundException):
        Sandbox.connect(sandbox.sandbox_id)


def test_list_and_its_filters(sdk: ApiService) -> None:
    red = Sandbox.create(template="base", metadata={"colour": "dark red", "n=1": "50%"})
    blue = Sandbox.create(template="small", metadata={"colour": "blue"})

    def ids(query: SandboxQuery | None = None, limit: int = 1) -> list[str]:
        pages = Sandbox.list(query=query, limit=limit)
        found = []
        while pages.has_next:
            found += [sandbox.sandbox_id for sandbox in pages.next_items()]
        return found

    assert ids() == [blue.sandbox_id, red.sandbox_id]
    assert ids(SandboxQuery(metadata={"colour": "dark red", "n=1": "50%"})) == [red.sandbox_id]
    assert ids(SandboxQuery(metadata={"colour": "green"})) == []
    assert ids(SandboxQuery(state=[SandboxState.PAUSED])) == []


def test_errors_reach_the_caller_as_its_exceptions(
    sdk: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SandboxException, match="no-such-template"):
        Sandbox.create(template="no-such-template")
    with pytest.raises(SandboxException, match="autoPause"):
        Sandbox.create(template="base", lifecycle={"on_timeout": "pause"})
    with pytest.raises(SandboxException, match=r"network\.denyOut"):
        Sandbox.create(template="base", network={"deny_out": ["0.0.0.0/0"]})

    attempts = []

    def fail(order: object) -> None:
        attempts.append(order)
        raise HostError("the guest's kernel did not start")

    sdk.node.on_create = fail
    with pytest.raises(SandboxException, match="did not start"):
        Sandbox.create(template="base")
    assert len(attempts) == 1, "a failed create is not tried again"
    with pytest.raises(AuthenticationException):
        Sandbox.create(template="base", api_key="e2b_" + "0" * 40)


def test_the_teams_limit_is_a_rate_limit(sdk: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmcell_api.store import records

    monkeypatch.setattr(records, "DEFAULT_SANDBOX_LIMIT", 1)
    key = sdk.new_key("small-team")
    Sandbox.create(template="base", api_key=key)
    with pytest.raises(RateLimitException, match="at most 1"):
        Sandbox.create(template="base", api_key=key)
