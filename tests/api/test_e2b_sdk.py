"""The unmodified E2B SDK against the API with a fake node, over loopback."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_service import ApiService, listening
from e2b import NotFoundException, Sandbox, SandboxQuery, SandboxState
from e2b.exceptions import (
    AuthenticationException,
    RateLimitException,
    SandboxException,
    SandboxNotFoundException,
)

from vmcell_api.egress import Egress
from vmcell_api.metric_sample import MetricSample
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


def test_network_rules(sdk: ApiService) -> None:
    sandbox = Sandbox.create(
        template="base",
        network={
            "allow_out": ["1.1.1.1"],
            "deny_out": lambda ctx: [ctx.all_traffic],
            "allow_public_traffic": False,
        },
    )
    assert sdk.node.orders[0].egress == Egress(allow_out=("1.1.1.1",), deny_out=("0.0.0.0/0",))
    assert sandbox.traffic_access_token
    again = Sandbox.connect(sandbox.sandbox_id)
    assert again.traffic_access_token == sandbox.traffic_access_token
    network = sandbox.get_info().network
    assert network is not None
    assert (network["allow_out"], network["deny_out"]) == (["1.1.1.1"], ["0.0.0.0/0"])
    sandbox.update_network({"deny_out": ["8.8.8.8/32"], "allow_internet_access": True})
    assert sdk.node.running[sandbox.sandbox_id].egress == Egress(deny_out=("8.8.8.8/32",))
    sandbox.kill()
    with pytest.raises(NotFoundException):
        sandbox.update_network({"deny_out": []})


def test_a_repeated_create_with_its_key(sdk: ApiService) -> None:
    first = Sandbox.create(template="base", idempotency_key="order-1")
    again = Sandbox.create(template="base", idempotency_key="order-1")
    assert again.sandbox_id == first.sandbox_id
    assert len(sdk.node.orders) == 1
    with pytest.raises(SandboxException, match="another body"):
        Sandbox.create(template="base", timeout=7, idempotency_key="order-1")


def test_a_create_is_repeated_while_the_first_is_at_work(sdk: ApiService) -> None:
    """The SDK does so by itself, as the answer says."""
    asked, go_on = threading.Event(), threading.Event()

    def wait(order: object) -> None:
        asked.set()
        assert go_on.wait(20)

    sdk.node.on_create = wait
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Sandbox.create, template="base", idempotency_key="order-1")
        assert asked.wait(20)
        second = pool.submit(Sandbox.create, template="base", idempotency_key="order-1")
        go_on.set()
        assert second.result(30).sandbox_id == first.result(30).sandbox_id
    assert len(sdk.node.orders) == 1


def test_metrics(sdk: ApiService) -> None:
    sandbox = Sandbox.create(template="base")
    assert sandbox.get_metrics() == []
    sdk.node.samples[sandbox.sandbox_id] = [
        MetricSample(
            unix_ms=1_800_000_000_000 + 5000 * number,
            cpu_count=2,
            cpu_used_pct=99.5,
            mem_used_bytes=1,
            mem_total_bytes=2,
            mem_cache_bytes=3,
            disk_used_bytes=4,
            disk_total_bytes=5,
        )
        for number in range(4)
    ]
    found = sandbox.get_metrics()
    assert len(found) == 4
    assert (found[0].cpu_used_pct, found[0].mem_cache, found[0].disk_total) == (99.5, 3, 5)
    start = datetime.datetime.fromtimestamp(1_800_000_005, datetime.UTC)
    assert len(sandbox.get_metrics(start=start)) == 3
    assert len(sandbox.get_metrics(end=start)) == 2
    sandbox.kill()
    with pytest.raises(NotFoundException):
        sandbox.get_metrics()


def test_pause_and_connect(sdk: ApiService) -> None:
    sandbox = Sandbox.create(template="base", lifecycle={"on_timeout": "pause"})
    assert sandbox.pause() is not False
    assert sandbox.pause() is False, "it was paused already"
    assert sandbox.get_info().state == SandboxState.PAUSED
    paused = Sandbox.list(query=SandboxQuery(state=[SandboxState.PAUSED])).next_items()
    assert [row.sandbox_id for row in paused] == [sandbox.sandbox_id]
    assert Sandbox.list(query=SandboxQuery(state=[SandboxState.RUNNING])).next_items() == []
    with pytest.raises(SandboxException, match="paused"):
        sandbox.set_timeout(60)
    again = Sandbox.connect(sandbox.sandbox_id, timeout=77)
    assert again.sandbox_id == sandbox.sandbox_id
    assert again.get_info().state == SandboxState.RUNNING
    assert sdk.node.resumes == [sandbox.sandbox_id]
    assert again.get_info().lifecycle["on_timeout"] == "pause"
    assert sandbox.pause() is not False
    assert sandbox.kill() is True
    with pytest.raises(SandboxNotFoundException):
        sandbox.pause()


def test_snapshots_and_sandboxes_made_of_them(sdk: ApiService) -> None:
    sandbox = Sandbox.create(template="base", envs={"A": "1"})
    first = sandbox.create_snapshot()
    second = sandbox.create_snapshot(name="mine")
    assert (first.names, second.names) == ([], ["mine"])
    page = sandbox.list_snapshots(limit=1)
    assert [row.snapshot_id for row in page.next_items()] == [second.snapshot_id]
    assert [row.snapshot_id for row in page.next_items()] == [first.snapshot_id]
    assert not page.has_next
    made = Sandbox.create(template="mine")
    assert sdk.node.orders[-1].snapshot_id == second.snapshot_id
    assert made.get_info().template_id == second.snapshot_id
    assert Sandbox.delete_snapshot(second.snapshot_id) is True
    assert Sandbox.delete_snapshot(second.snapshot_id) is False
    with pytest.raises(SandboxException, match="does not exist"):
        Sandbox.create(template="mine")
    assert made.get_info().state == SandboxState.RUNNING


def test_forks(sdk: ApiService) -> None:
    sandbox = Sandbox.create(template="base", metadata={"a": "b"})
    copies = sandbox.fork(count=3, timeout=60)
    assert len({copy.sandbox_id for copy in copies} | {sandbox.sandbox_id}) == 4
    assert {copy.get_info().metadata["a"] for copy in copies} == {"b"}
    tokens = {order.access_token for order in sdk.node.orders}
    assert len(tokens) == 4
    assert sdk.node.saved == {}, "the snapshot between is gone"
    with pytest.raises(SandboxException, match="room for 4 sandboxes, not for 5"):
        sandbox.fork(count=5)

    def fail(order: object) -> None:
        raise HostError("no luck")

    sdk.node.on_create = fail
    (failed,) = sandbox.fork(count=1)
    assert isinstance(failed, SandboxException)
    assert "no luck" in str(failed)


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
    assert ids(SandboxQuery(template="small")) == [blue.sandbox_id]
    started = blue.get_info().started_at
    assert ids(SandboxQuery(started_after=started)) == [blue.sandbox_id], "at or after"
    oldest = Sandbox.list(limit=1, order="asc")
    assert oldest.next_items()[0].sandbox_id == red.sandbox_id
    assert oldest.has_next


def test_errors_reach_the_caller_as_its_exceptions(
    sdk: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SandboxException, match="no-such-template"):
        Sandbox.create(template="no-such-template")
    with pytest.raises(SandboxException, match="memory"):
        Sandbox.create(template="base").pause(keep_memory=False)
    with pytest.raises(SandboxException, match=r"network\.allowOut"):
        Sandbox.create(
            template="base",
            network={"allow_out": ["example.com"], "deny_out": lambda ctx: [ctx.all_traffic]},
        )
    with pytest.raises(SandboxException, match=r"network\.dnsServers"):
        Sandbox.create(template="base", network={"dns_servers": ["9.9.9.9"]})

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
