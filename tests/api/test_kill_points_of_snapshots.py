"""noded and the API killed (SIGKILL) at every point of pause, resume, snapshot, rollback, fork.

What the next noded finds is the sandbox, running or paused as the point says: it can be paused,
resumed and killed, and then nothing of it is left. A fork is a snapshot and creates. The runtime is
runc and the shim's part a double; with our own shim, and a fake guest, every save is cut off too.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import app_of
from checkpoint_double import CheckpointDouble
from deep import one_in
from dying_node import (
    PATIENCE_S,
    doomed,
    nothing_left,
    opened,
    order_of,
    saving_noded_dies,
    wait_until,
    write_config,
)
from falcon import testing
from kill_points import SAVING_API_POINTS, SAVING_POINTS
from private_containerd import IMAGE as LAYERS
from private_containerd import PrivateContainerd
from real_containerd import RealContainerd
from shimmed_containerd import shimmed_containerd
from stand_in_images import GOOD

from vmcell_api.node import door
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.tenancy import create_key

pytestmark = pytest.mark.root


def test_there_are_as_many_points_as_the_issue_asks_for() -> None:
    assert len(SAVING_POINTS) >= 20
    assert {point.verb for point in SAVING_POINTS.values()} == {
        *("pause", "resume", "snapshot", "rollback")
    }


@pytest.mark.parametrize("name", one_in(4, SAVING_POINTS))
def test_noded_killed(
    name: str, containerd: RealContainerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(containerd.socket, "io.containerd.runc.v2", tmp_path)
    CheckpointDouble(config).install(monkeypatch.setattr)
    saving_noded_dies(name, containerd, config, tmp_path, order_of())


@pytest.mark.parametrize("name", one_in(4, SAVING_API_POINTS))
def test_the_api_killed(
    name: str, containerd: RealContainerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source lives on; what the next API lists can be ended, and nothing else is for ever."""
    config = write_config(containerd.socket, "io.containerd.runc.v2", tmp_path)
    CheckpointDouble(config).install(monkeypatch.setattr)
    migrate(config.database_url)
    store = Store(open_engine(config.database_url))
    key, _ = create_key(store, store.ensure_team("me"), scopes=("*",))
    with opened(config) as node:
        server = door.serve(door.Door(node, disk_mib=1), config.node_socket, owner_uid=os.geteuid())
        try:
            source = _die_in(name, key, tmp_path)
            client = testing.TestClient(app_of(config), headers={"X-API-KEY": key})
            # noded finishes what it was asked for.
            wait_until(lambda: not node._registry.entry(source).lock.locked(), "it hangs")
            listed = [row["sandboxID"] for row in client.simulate_get("/v2/sandboxes").json]
            assert source in listed
            assert sorted(listed) == sorted(row.sandbox_id for row in node.list())
            route = f"/v2/sandboxes/{source}/connect"
            assert client.simulate_post(route, json={}).status_code in (200, 201)
            for sandbox_id in listed:
                assert client.simulate_delete(f"/sandboxes/{sandbox_id}").status_code == 204
            for row in client.simulate_get("/snapshots").json:
                path = f"/templates/{row['snapshotID']}"
                assert client.simulate_delete(path).status_code == 204
            for record in node.snapshots.records():
                assert record.expires_at_unix_ms, record
                node.snapshots.remove(record.snapshot_id)
            nothing_left(node, containerd)
        finally:
            server.stop(0).wait()
            store.close()


def _die_in(name: str, key: str, folder: Path) -> str:
    """The API dies at the point; the id of the sandbox it was about."""
    verb = SAVING_API_POINTS[name].verb
    with doomed("api", name, folder) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        made = _ask(address, key, "/v2/sandboxes", {"templateID": GOOD})
        path, body = {
            "pause": ("pause", {}),
            "make": ("snapshots", {"name": "mine"}),
            "fork": ("fork", {"count": 2}),
        }[verb]
        with pytest.raises((http.client.HTTPException, OSError)):
            _ask(address, key, f"/sandboxes/{made['sandboxID']}/{path}", body)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL, (folder / "doomed.log").read_text()
    return made["sandboxID"]


def _ask(address: str, key: str, path: str, body: object) -> dict[str, str]:
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request("POST", path, body=json.dumps(body), headers={"X-API-KEY": key})
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status < 300, data
        return json.loads(data)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    with shimmed_containerd(tmp_path_factory.mktemp("shimmed")) as daemon:
        yield daemon


SHIM_POINTS = [
    name
    for name, point in SAVING_POINTS.items()
    if point.call in ("checkpoint_task", "create_task", "start_task", "kill_task")
]


@pytest.mark.parametrize("name", one_in(8, SHIM_POINTS))
def test_noded_killed_with_our_shim(name: str, shimmed: PrivateContainerd, tmp_path: Path) -> None:
    containerd = RealContainerd(
        folder=shimmed.directory, socket=str(shimmed.socket), log=shimmed.log
    )
    folder = f"{shimmed.directory}/snapshots"
    config = write_config(
        containerd.socket, "io.containerd.vmcell.v2", tmp_path, snapshot_dir=folder
    )
    saving_noded_dies(name, containerd, config, tmp_path, order_of(LAYERS))
    wait_until(lambda: not shimmed.leftovers(), f"{shimmed.leftovers()}")
