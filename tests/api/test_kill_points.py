"""noded and the API killed (SIGKILL) at every point of a create and of a kill.

What the next process finds is a whole sandbox that it lists, or nothing at all: no task, container,
snapshot, lease, file, slot, rule or row.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from api_service import app_of
from deep import one_in
from dying_node import (
    PATIENCE_S,
    doomed,
    noded_dies,
    nothing_left,
    opened,
    order_of,
    wait_until,
)
from falcon import testing
from kill_points import API_POINTS, NODED_POINTS, WHOLE, Point
from real_containerd import RealContainerd
from stand_in_images import GOOD

from vmcell_api import control_plane, create_once
from vmcell_api.config import ApiConfig
from vmcell_api.node import door
from vmcell_api.node.node import Node
from vmcell_api.node_client import NewSandbox
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.tenancy import create_key

pytestmark = pytest.mark.root


@pytest.mark.parametrize("name", one_in(4, NODED_POINTS))
def test_noded_killed(
    name: str, containerd: RealContainerd, config: ApiConfig, tmp_path: Path
) -> None:
    noded_dies(name, containerd, config, tmp_path, order_of())


def test_every_call_of_a_create_and_a_kill_is_a_point(
    containerd: RealContainerd, config: ApiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is added to either must be added to the table."""
    from vmcell_api.node import containerd as module

    seen: set[str] = set()
    call = module.Containerd.call

    def note(self: object, method: object, request: object, tried: str, **options: object):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "_delete" and frame.f_back is not None:
            frame = frame.f_back
        seen.add(frame.f_code.co_name)
        return call(self, method, request, tried, **options)

    with opened(config) as node:
        monkeypatch.setattr(module.Containerd, "call", note)
        order = order_of()
        node.create(door.checked_request(_message(order)))
        node.kill(order.sandbox_id)
    named = {point.call for point in NODED_POINTS.values()}
    reading = {"image_target", "read_blob", "task_states"}
    assert seen - reading <= named
    assert {"create_lease", "create_task", "set_labels"} <= seen


def _message(order: NewSandbox) -> object:
    from vmcell_protos.pb import node_pb2

    return node_pb2.CreateSandboxRequest(
        sandbox_id=order.sandbox_id,
        template_id=order.template_id,
        image=order.image,
        vcpus=order.vcpus,
        memory_mib=order.memory_mib,
        timeout_ms=order.timeout_s * 1000,
    )


class _Api:
    """A new API in this process, and the store behind it."""

    def __init__(self, config: ApiConfig, key: str) -> None:
        self.store = Store(open_engine(config.database_url))
        self.team = self.store.ensure_team("me")
        self._client = testing.TestClient(app_of(config))
        self._headers = {"X-API-KEY": key}

    def __call__(self, method: str, path: str, **options: object) -> testing.Result:
        headers = {**self._headers, **options.pop("headers", {})}  # type: ignore[dict-item]
        return self._client.simulate_request(method, path, headers=headers, **options)

    def listed(self) -> list[str]:
        return [row["sandboxID"] for row in self("GET", "/v2/sandboxes").json]


BODY = {"templateID": GOOD, "network": {"allowOut": ["93.184.216.0/24"]}}


def _ask(address: str, key: str, method: str, path: str, body: object = None) -> dict[str, object]:
    """One request to the doomed API; raises when it dies in it."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    headers = {"X-API-KEY": key, "Idempotency-Key": "k-1"}
    try:
        connection.request(method, path, body=json.dumps(body) if body else None, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status < 300, data
        return json.loads(data) if data else {}
    finally:
        connection.close()


def _ask_for_both(address: str, key: str) -> None:
    made = _ask(address, key, "POST", "/v2/sandboxes", BODY)
    _ask(address, key, "DELETE", f"/sandboxes/{made['sandboxID']}")


@pytest.mark.parametrize("name", one_in(4, API_POINTS))
def test_the_api_killed(
    name: str,
    containerd: RealContainerd,
    config: ApiConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = API_POINTS[name]
    migrate(config.database_url)
    store = Store(open_engine(config.database_url))
    key, _ = create_key(store, store.ensure_team("me"), scopes=("*",))
    store.close()
    with opened(config) as node:
        server = door.serve(door.Door(node, disk_mib=1), config.node_socket, owner_uid=os.geteuid())
        try:
            _die_at(name, key, tmp_path)
            api = _Api(config, key)
            if point.leaves == WHOLE:
                _is_whole(api, node, point)
            assert api.listed() == []
            later = control_plane.now_ms() + config.start_timeout_s * 1000 + 61_000
            for module in (control_plane, create_once):
                monkeypatch.setattr(module, "now_ms", lambda: later)
            assert api.listed() == []
            assert api.store.sandboxes(team_id=api.team.team_id) == {}, "a row is left"
            nothing_left(node, containerd)
            api.store.close()
        finally:
            server.stop(0).wait()


def _die_at(name: str, key: str, folder: Path) -> None:
    with doomed("api", name, folder) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, (folder / "doomed.log").read_text()
        with pytest.raises((http.client.HTTPException, OSError)):
            _ask_for_both(address, key)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL, (folder / "doomed.log").read_text()


def _is_whole(api: _Api, node: Node, point: Point) -> None:
    """It is listed, a repeat of its create finds it, and it can be killed."""
    wait_until(lambda: node.list(), "noded does not finish what the API asked for")
    (sandbox,) = node.list()
    assert api.listed() == [sandbox.sandbox_id]
    if point.verb == "create":
        again = api(
            "POST", "/v2/sandboxes", body=json.dumps(BODY), headers={"Idempotency-Key": "k-1"}
        )
        assert (again.status_code, again.json["sandboxID"]) == (201, sandbox.sandbox_id)
    assert api("DELETE", f"/sandboxes/{sandbox.sandbox_id}").status_code == 204
