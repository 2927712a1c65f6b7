"""noded's pause, resume, snapshots and rollback on a real containerd.

The runtime is runc and the shim's part a double (checkpoint_double), so what is looked at is the
order of containerd's calls, labels and files, who wins a race, and what is left behind.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoint_double import CheckpointDouble
from dying_node import wait_until
from real_containerd import RealContainerd
from saving_node import (
    TOKEN,
    counted,
    init_of,
    labels_of,
    nothing_left,
    request_of,
    snapshot_names,
)
from stand_in_images import GOOD, import_stand_ins

from vmcell_api.config import ApiConfig
from vmcell_api.egress import CLOSED
from vmcell_api.node import node as node_module
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import PAUSED, PAUSING, RUNNING
from vmcell_api.node.snapshot_records import KEPT, UNDO, new_snapshot_id
from vmcell_api.volumes.names import VolumeMount, new_volume_id
from vmcell_protos.errors import CallerError, HostError

pytestmark = pytest.mark.root


# Pause and resume.


def test_a_paused_sandbox_is_on_disk_alone(
    node: Node, containerd: RealContainerd, config: ApiConfig, double: CheckpointDouble
) -> None:
    sandbox = node.create(request_of(egress=CLOSED))
    paused = node.pause(sandbox.sandbox_id)
    assert (paused.state, paused.egress) == (PAUSED, CLOSED)
    assert node.get(sandbox.sandbox_id) == paused
    assert containerd.traces()["tasks"] == []
    assert containerd.traces()["containers"] == [sandbox.sandbox_id]
    assert node.slots.free_count == 3
    assert double.saves == [
        {
            "snapshot_id": paused.snapshot_id,
            "then": "pause",
            "drop_caches": False,
            "container_id": sandbox.sandbox_id,
        }
    ]
    assert labels_of(containerd, sandbox.sandbox_id)["io.vmcell.state"] == "paused"
    with pytest.raises(CallerError, match="paused already") as caught:
        node.pause(sandbox.sandbox_id)
    assert caught.value.code == "aborted"
    with pytest.raises(CallerError, match="is paused, not running"):
        node.snapshot(sandbox.sandbox_id, new_snapshot_id(KEPT))
    with pytest.raises(CallerError, match="is paused, not running"):
        node.rollback(sandbox.sandbox_id, new_snapshot_id(KEPT), undo_life_ms=1)
    node.kill(sandbox.sandbox_id)
    nothing_left(node, containerd, config)


def test_resume_is_the_same_sandbox_in_another_slot(
    node: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    sandbox = node.create(request_of())
    node.pause(sandbox.sandbox_id)
    other = node.create(request_of())
    assert other.slot_number == 2, "the slot after the one that is free again"
    resumed, by_this = node.resume(sandbox.sandbox_id, 50_000)
    assert by_this
    assert (resumed.state, resumed.snapshot_id) == (RUNNING, "")
    assert resumed.address != other.address
    assert resumed.started_at_unix_ms == sandbox.started_at_unix_ms
    assert abs(resumed.end_at_unix_ms - time.time() * 1000 - 50_000) < 10_000
    assert [name for name in snapshot_names(config) if "pause" in name] == []
    told = init_of(containerd, sandbox.sandbox_id)
    assert told["accessToken"] == TOKEN
    assert "envVars" not in told, "what it was told first holds"
    info = json.loads(containerd.ctr("containers", "info", sandbox.sandbox_id))
    annotations = info["Spec"]["annotations"]
    assert annotations["io.vmcell.snapshot"].startswith("pause-")
    assert annotations["io.vmcell.net.address"] == f"{resumed.address}/31"
    again, by_this = node.resume(sandbox.sandbox_id, 40_000)
    assert (again, by_this) == (resumed, False), "a later end stays"
    longer, _ = node.resume(sandbox.sandbox_id, 90_000)
    assert longer.end_at_unix_ms > resumed.end_at_unix_ms
    for _ in range(2):
        node.pause(sandbox.sandbox_id)
        node.resume(sandbox.sandbox_id, 0)
    assert abs(node.get(sandbox.sandbox_id).end_at_unix_ms - time.time() * 1000 - 600_000) < 10_000


def test_of_many_resumes_at_once_one_restores(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox_id = node.create(request_of(auto_resume=True)).sandbox_id
    node.pause(sandbox_id)
    made = counted(monkeypatch, "create_task")
    with ThreadPoolExecutor(30) as pool:
        calls = [
            pool.submit(node.resume, sandbox_id, 60_000, by_request=bool(number % 2))
            for number in range(30)
        ]
        found = [call.result() for call in calls]
    assert made == [sandbox_id]
    assert sum(by_this for _, by_this in found) == 1
    assert len({sandbox.address for sandbox, _ in found}) == 1


def test_requests_wake_only_what_says_so(node: Node) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    assert node.resume(sandbox_id, 0, by_request=True)[1] is False
    node.pause(sandbox_id)
    with pytest.raises(CallerError, match="is paused") as caught:
        node.resume(sandbox_id, 0, by_request=True)
    assert caught.value.code == "failed_precondition"
    assert node.get(sandbox_id).state == PAUSED


@pytest.mark.parametrize("by_request", [True, False])
def test_a_resume_calls_a_pause_off(
    node: Node, double: CheckpointDouble, containerd: RealContainerd, by_request: bool
) -> None:
    sandbox = node.create(request_of(auto_resume=True))
    pid = containerd.ctr("tasks", "list").split()[-2]
    found: list[object] = []
    resumes: list[threading.Thread] = []

    def resume() -> None:
        found.append(node.resume(sandbox.sandbox_id, 700_000, by_request=by_request))

    def arrive() -> None:
        assert node.get(sandbox.sandbox_id).state == PAUSING
        thread = threading.Thread(target=resume)
        thread.start()
        resumes.append(thread)
        wait_until(lambda: node._registry.entry(sandbox.sandbox_id).wanted, "it does not wait")

    double.while_saving = arrive
    with pytest.raises(CallerError, match="called the pause off"):
        node.pause(sandbox.sandbox_id)
    resumes[0].join(20)
    ((running, by_this),) = found
    assert (running.state, by_this, running.address) == (RUNNING, False, sandbox.address)
    assert containerd.ctr("tasks", "list").split()[-2:] == [pid, "RUNNING"]
    assert node.snapshots.records() == []
    assert labels_of(containerd, sandbox.sandbox_id)["io.vmcell.state"] == "running"
    double.while_saving = lambda: None
    assert node.pause(sandbox.sandbox_id).state == PAUSED


def test_requests_do_not_call_off_the_pause_of_a_sandbox_that_stays_paused(
    node: Node, double: CheckpointDouble
) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    refused: list[str] = []

    def arrive() -> None:
        with pytest.raises(CallerError) as caught:
            node.resume(sandbox_id, 0, by_request=True)
        refused.append(caught.value.code)

    double.while_saving = arrive
    assert node.pause(sandbox_id).state == PAUSED
    assert refused == ["failed_precondition"]


def test_a_save_that_fails_leaves_the_sandbox_running(
    node: Node, double: CheckpointDouble, containerd: RealContainerd
) -> None:
    sandbox_id = node.create(request_of()).sandbox_id

    def fail() -> None:
        raise HostError("no space left on device", code="resource_exhausted")

    double.while_saving = fail
    with pytest.raises(HostError, match="no space left"):
        node.pause(sandbox_id)
    with pytest.raises(HostError, match="no space left"):
        node.snapshot(sandbox_id, new_snapshot_id(KEPT))
    assert node.get(sandbox_id).state == RUNNING
    assert containerd.ctr("tasks", "list").split()[-1] == "RUNNING"
    assert labels_of(containerd, sandbox_id)["io.vmcell.state"] == "running"
    assert node.snapshots.records() == []


def test_a_shim_that_saves_elsewhere_is_found_out(
    node: Node, double: CheckpointDouble, tmp_path: Path
) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    double.directory = tmp_path
    with pytest.raises(HostError, match="not in noded's snapshot_dir"):
        node.pause(sandbox_id)
    assert node.get(sandbox_id).state == RUNNING


def test_a_damaged_snapshot_leaves_the_sandbox_paused(
    node: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    paused = node.pause(sandbox_id)
    memory = Path(config.snapshot_dir, paused.snapshot_id, "memory")
    good = memory.read_bytes()
    memory.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    for _ in range(2):
        with pytest.raises(CallerError, match=r"memory of snapshot .* is damaged"):
            node.resume(sandbox_id, 1000)
        assert node.get(sandbox_id) == paused
        assert node.slots.free_count == 3
        assert containerd.traces()["tasks"] == []
    memory.write_bytes(good)
    assert node.resume(sandbox_id, 1000)[1]


def test_without_a_free_slot_a_sandbox_stays_paused(node: Node) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    node.pause(sandbox_id)
    others = [node.create(request_of()).sandbox_id for _ in range(3)]
    with pytest.raises(HostError, match="in use") as caught:
        node.resume(sandbox_id, 1000)
    assert caught.value.code == "resource_exhausted"
    assert node.get(sandbox_id).state == PAUSED
    node.kill(others[0])
    assert node.resume(sandbox_id, 1000)[1]


def test_a_sandbox_with_volumes_is_not_paused(node: Node, config: ApiConfig) -> None:
    volume_id = new_volume_id()
    node.volumes.make(volume_id)
    mount = VolumeMount(volume_id=volume_id, name="v", path="/data")
    sandbox_id = node.create(request_of(volume_mounts=(mount,))).sandbox_id
    with pytest.raises(CallerError, match="has volumes"):
        node.pause(sandbox_id)
    assert node.get(sandbox_id).state == RUNNING


# The deadline.


def test_a_sandbox_pauses_at_its_end(node: Node) -> None:
    sandbox_id = node.create(request_of(timeout_ms=300, pause_on_timeout=True)).sandbox_id
    wait_until(lambda: node.get(sandbox_id).state == PAUSED, "it does not pause")
    node.resume(sandbox_id, 300)
    wait_until(lambda: node.get(sandbox_id).state == PAUSED, "it does not pause again")
    node.resume(sandbox_id, 60_000)
    node.set_deadline(sandbox_id, 0, only_extend=False)
    wait_until(lambda: node.get(sandbox_id).state == PAUSED, "it does not pause at once")


def test_a_pause_at_the_end_that_fails_is_tried_again(
    node: Node, double: CheckpointDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "PAUSE_AGAIN_MS", 100)
    tries: list[int] = []

    def fail_twice() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise HostError("no space left on device")

    double.while_saving = fail_twice
    sandbox_id = node.create(request_of(timeout_ms=200, pause_on_timeout=True)).sandbox_id
    wait_until(lambda: node.get(sandbox_id).state == PAUSED, "it does not pause")
    assert len(tries) == 3


# Snapshots.


def test_sandboxes_of_a_snapshot(node: Node, containerd: RealContainerd, config: ApiConfig) -> None:
    source = node.create(request_of())
    record = node.snapshot(source.sandbox_id, new_snapshot_id(KEPT))
    assert node.get(source.sandbox_id) == source
    assert containerd.ctr("tasks", "list").split()[-1] == "RUNNING"
    secret = Path(config.snapshot_dir, ".noded", "vmcell", f"{record.snapshot_id}.json")
    assert secret.stat().st_mode & 0o777 == 0o600
    node.kill(source.sandbox_id)
    assert node.snapshots.get(record.snapshot_id) == record
    request = request_of(
        snapshot_id=record.snapshot_id,
        access_token="another",
        environment={"SIZE": "big"},
        template_id="copied",
        image="whatever",
    )
    made = node.create(request)
    assert (made.image, made.vcpus, made.memory_mib) == (GOOD, 1, 128)
    told = init_of(containerd, made.sandbox_id)
    assert told["accessToken"] == "another"
    assert told["envVars"] == {
        "COLOUR": "red",
        "SIZE": "big",
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": made.sandbox_id,
        "E2B_TEMPLATE_ID": "copied",
    }
    node.snapshots.remove(record.snapshot_id)
    assert node.get(made.sandbox_id) == made
    with pytest.raises(CallerError, match="was not found on this node"):
        node.create(request_of(snapshot_id=record.snapshot_id))


def test_the_layers_stay_while_a_snapshot_needs_them(
    node: Node, containerd: RealContainerd
) -> None:
    containerd.ctr("images", "tag", GOOD, "docker.io/test/short:1")
    source = node.create(request_of(image="docker.io/test/short:1"))
    record = node.snapshot(source.sandbox_id, new_snapshot_id(KEPT))
    node.kill(source.sandbox_id)
    containerd.ctr("images", "remove", "--sync", "docker.io/test/short:1", GOOD)
    try:
        made = node.create(request_of(snapshot_id=record.snapshot_id))
        assert made.image == "docker.io/test/short:1"
    finally:
        import_stand_ins(containerd)


def test_what_a_restored_machine_cannot_have_is_refused(node: Node) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    record = node.snapshot(sandbox_id, new_snapshot_id(KEPT))
    with pytest.raises(CallerError, match="envd asks for a token"):
        node.create(request_of(snapshot_id=record.snapshot_id, access_token=""))
    mount = VolumeMount(volume_id=new_volume_id(), name="v", path="/data")
    with pytest.raises(CallerError, match="cannot have volumes"):
        node.create(request_of(snapshot_id=record.snapshot_id, volume_mounts=(mount,)))
    with pytest.raises(CallerError, match="exists already"):
        node.snapshot(sandbox_id, record.snapshot_id)
    assert node.snapshots.get(record.snapshot_id) == record


def test_a_snapshot_is_not_removed_while_it_is_restored(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    record = node.snapshot(sandbox_id, new_snapshot_id(KEPT))
    refused: list[str] = []
    start = Containerd.start_task

    def start_task(self: Containerd, container_id: str, *, timeout_s: float) -> None:
        with pytest.raises(CallerError) as caught:
            node.snapshots.remove(record.snapshot_id)
        refused.append(caught.value.code)
        start(self, container_id, timeout_s=timeout_s)

    monkeypatch.setattr(Containerd, "start_task", start_task)
    node.create(request_of(snapshot_id=record.snapshot_id))
    assert refused == ["aborted"]
    node.snapshots.remove(record.snapshot_id)


def test_a_snapshot_with_an_end_goes(node: Node) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    node.snapshot(sandbox_id, new_snapshot_id(KEPT), life_ms=100)
    kept = node.snapshot(sandbox_id, new_snapshot_id(KEPT))
    wait_until(lambda: node.snapshots.records() == [kept], "it does not go")


# Rollback.


def test_rollback_swaps_and_can_be_undone(
    node: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    source = node.create(request_of(pause_on_timeout=True, auto_resume=True, egress=CLOSED))
    record = node.snapshot(source.sandbox_id, new_snapshot_id(KEPT))
    rolled, undo = node.rollback(source.sandbox_id, record.snapshot_id, undo_life_ms=60_000)
    assert node.get(source.sandbox_id) == rolled
    assert node.list() == [rolled]
    assert rolled.container != source.container
    assert (rolled.sandbox_id, rolled.egress) == (source.sandbox_id, CLOSED)
    assert (rolled.pause_on_timeout, rolled.auto_resume) == (True, True)
    assert rolled.end_at_unix_ms == source.end_at_unix_ms, "a rollback buys no time"
    assert rolled.address != source.address
    assert undo.kind == UNDO
    assert containerd.traces()["tasks"] == [rolled.container]
    assert containerd.traces()["containers"] == [rolled.container]
    assert node.slots.free_count == 2
    told = init_of(containerd, rolled.container)
    assert told["accessToken"] == TOKEN
    assert told["envVars"]["E2B_SANDBOX_ID"] == source.sandbox_id
    undone, redo = node.rollback(source.sandbox_id, undo.snapshot_id, undo_life_ms=60_000)
    assert undone.generation == 2
    assert {redo.kind, undo.kind} == {UNDO}
    node.pause(source.sandbox_id)
    assert node.resume(source.sandbox_id, 0)[0].container == undone.container
    node.kill(source.sandbox_id)
    kinds = [row.kind for row in node.snapshots.records()]
    assert kinds == [KEPT], "undo points go with the sandbox"


def test_a_rolled_back_sandbox_that_dies_is_seen(node: Node, containerd: RealContainerd) -> None:
    sandbox_id = node.create(request_of()).sandbox_id
    record = node.snapshot(sandbox_id, new_snapshot_id(KEPT))
    rolled, _ = node.rollback(sandbox_id, record.snapshot_id, undo_life_ms=60_000)
    containerd.ctr("tasks", "kill", "-s", "SIGKILL", rolled.container)
    wait_until(lambda: not containerd.traces()["snapshots"], "its end is not seen")
    assert node.list() == []


def test_a_rollback_that_fails_changes_nothing(
    node: Node, containerd: RealContainerd, config: ApiConfig, double: CheckpointDouble
) -> None:
    source = node.create(request_of())
    record = node.snapshot(source.sandbox_id, new_snapshot_id(KEPT))
    stranger = node.create(request_of())
    theirs = node.snapshot(stranger.sandbox_id, new_snapshot_id(KEPT))
    with pytest.raises(CallerError, match="is none of sandbox"):
        node.rollback(source.sandbox_id, theirs.snapshot_id, undo_life_ms=1000)
    Path(config.snapshot_dir, record.snapshot_id, "disk").write_bytes(b"evil")
    with pytest.raises(CallerError, match=r"disk of snapshot .* is damaged"):
        node.rollback(source.sandbox_id, record.snapshot_id, undo_life_ms=1000)
    Path(config.snapshot_dir, record.snapshot_id, "disk").write_bytes(b"disk")

    def fail() -> None:
        raise HostError("no space left on device")

    double.while_saving = fail
    with pytest.raises(HostError, match="no space left"):
        node.rollback(source.sandbox_id, record.snapshot_id, undo_life_ms=1000)
    double.while_saving = lambda: None
    assert node.get(source.sandbox_id) == source
    assert sorted(containerd.traces()["tasks"]) == sorted([source.sandbox_id, stranger.sandbox_id])
    states = containerd.ctr("tasks", "list").splitlines()[1:]
    assert {line.split()[-1] for line in states} == {"RUNNING"}
    assert node.slots.free_count == 1
    full = node.create(request_of())
    with pytest.raises(HostError, match="in use"):
        node.rollback(source.sandbox_id, record.snapshot_id, undo_life_ms=1000)
    node.kill(full.sandbox_id)
