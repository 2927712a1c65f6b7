"""Templates that are restored, and the pool, on a real containerd; the shim's part is a double.

The verbs themselves are test_node_snapshots'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_double import CheckpointDouble
from dying_node import wait_until
from real_containerd import RealContainerd
from saving_node import (
    counted,
    init_of,
    opened_node,
    remove_all,
    request_of,
    snapshot_of,
)
from stand_in_images import GOOD

from vmcell_api.config import ApiConfig
from vmcell_api.egress import CLOSED
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import PAUSED, Sandbox
from vmcell_api.node.snapshot_records import TEMPLATE
from vmcell_api.volumes.names import VolumeMount, new_volume_id
from vmcell_protos.errors import HostError

pytestmark = pytest.mark.root


@pytest.fixture
def templates(config: ApiConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ApiConfig:
    """The settings of a node that restores templates; the guest's files are in `tmp_path`."""
    for name in ("kernel", "base.erofs"):
        (tmp_path / name).write_text(name)
    settings = tmp_path / "config.toml"
    settings.write_text(
        f'kernel = "{tmp_path}/kernel"\nbase_image = "{tmp_path}/base.erofs"\nstate_dir = "/x"\n'
    )
    monkeypatch.setenv("VMCELL_CONFIG", str(settings))
    return replace(config, template_snapshots=2)


@pytest.fixture
def warm(
    templates: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> Iterator[Node]:
    with opened_node(templates) as opened:
        try:
            yield opened
            _settled(opened)
            remove_all(opened, containerd, templates)
        finally:
            opened.slots.close_all()


def _settled(node: Node) -> list[str]:
    """The templates' snapshots once none is being made."""
    wait_until(lambda: not node._warm._making, "one is being made for ever")
    return [row.snapshot_id for row in node.snapshots.records() if row.kind == TEMPLATE]


def test_the_second_create_of_a_template_restores(
    warm: Node, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    first = warm.create(request_of())
    (snapshot_id,) = _settled(warm)
    assert snapshot_of(containerd, first) == ""
    assert warm.list() == [first], "noded's own sandbox is gone"
    assert (double.saves[0]["then"], double.saves[0]["drop_caches"]) == ("pause", True)
    request = request_of(access_token="mine", environment={"A": "1"}, egress=CLOSED)
    second = warm.create(request)
    assert snapshot_of(containerd, second) == snapshot_id
    assert (second.egress, second.template_id) == (CLOSED, "good")
    told = init_of(containerd, second.sandbox_id)
    assert told["accessToken"] == "mine"
    assert told["envVars"] == {
        "A": "1",
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": second.sandbox_id,
        "E2B_TEMPLATE_ID": "good",
    }
    assert warm.pause(second.sandbox_id).state == PAUSED
    warm.resume(second.sandbox_id, 0)
    assert len(double.saves) == 2


def test_what_a_restored_machine_cannot_be_boots(
    warm: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    warm.kill(warm.create(request_of()).sandbox_id)
    _settled(warm)
    for options in ({"access_token": ""}, {"vcpus": 2}, {"memory_mib": 256}):
        made = warm.create(request_of(**options))
        assert snapshot_of(containerd, made) == "", options
        _settled(warm)
        warm.kill(made.sandbox_id)
    volume_id = new_volume_id()
    warm.volumes.make(volume_id)
    mount = VolumeMount(volume_id=volume_id, name="v", path="/data")
    made = warm.create(request_of(volume_mounts=(mount,)))
    assert snapshot_of(containerd, made) == ""
    assert len(_settled(warm)) == 2, "the oldest over the limit is gone"


def test_a_template_whose_snapshot_is_refused_boots(
    warm: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    warm.kill(warm.create(request_of()).sandbox_id)
    (damaged,) = _settled(warm)
    Path(config.snapshot_dir, damaged, "memory").write_bytes(b"evil")
    made = warm.create(request_of())
    assert snapshot_of(containerd, made) == ""
    warm.kill(made.sandbox_id)
    made = warm.create(request_of())
    (again,) = _settled(warm)
    assert again != damaged
    assert snapshot_of(containerd, warm.create(request_of())) == again


def test_a_guest_of_other_files_is_saved_anew(
    warm: Node, containerd: RealContainerd, tmp_path: Path
) -> None:
    for name in ("kernel", "base.erofs"):
        warm.kill(warm.create(request_of()).sandbox_id)
        (before,) = _settled(warm)
        (tmp_path / name).write_text("another")
        made = warm.create(request_of())
        assert snapshot_of(containerd, made) == ""
        (after,) = _settled(warm)
        assert after != before
        warm.kill(made.sandbox_id)


def test_a_save_that_fails_costs_a_template_nothing(
    warm: Node, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    def fail() -> None:
        raise HostError("no space left on device")

    double.while_saving = fail
    made = warm.create(request_of())
    assert _settled(warm) == []
    assert warm.list() == [made]
    double.while_saving = lambda: None
    warm.create(request_of())
    assert len(_settled(warm)) == 1


def test_the_next_noded_has_the_templates_snapshots(
    templates: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    with opened_node(templates) as first:
        one = first.create(request_of())
        (snapshot_id,) = _settled(first)
    with opened_node(templates) as second:
        try:
            two = second.create(request_of())
            assert snapshot_of(containerd, two) == snapshot_id
            assert {row.sandbox_id for row in second.list()} == {one.sandbox_id, two.sandbox_id}
            remove_all(second, containerd, templates)
        finally:
            second.slots.close_all()


def test_a_built_template_is_saved_before_its_first_create(
    warm: Node, containerd: RealContainerd
) -> None:
    warm.prepare_template(request_of())
    (snapshot_id,) = _settled(warm)
    warm.prepare_template(request_of())
    assert _settled(warm) == [snapshot_id]
    made = warm.create(request_of())
    assert snapshot_of(containerd, made) == snapshot_id
    warm.forget_template(GOOD)
    assert _settled(warm) == []
    assert warm.get(made.sandbox_id) == made


# The pool.


@pytest.fixture
def pooled(
    templates: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> Iterator[Node]:
    """A node where one sandbox of the template `good` waits, or is on its way."""
    with opened_node(replace(templates, pool=("good=1",))) as opened:
        try:
            opened.prepare_template(request_of())
            wait_until(lambda: opened.pool.count == 1, "nothing is parked")
            yield opened
            _settled(opened)
            opened.forget_template(GOOD)
            opened._warm._maker.submit(int).result(60)  # what it was parking is parked
            while opened.pool.give_up_one():
                pass
            remove_all(opened, containerd, templates)
        finally:
            opened.slots.close_all()


def test_what_waits_is_handed_out_as_what_is_asked_for(
    pooled: Node, containerd: RealContainerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pooled.list() == [], "it is nobody's"
    (waiting,) = containerd.traces()["tasks"]
    made = counted(monkeypatch, "create_task")
    request = request_of(
        access_token="mine", environment={"A": "1"}, egress=CLOSED, auto_resume=True
    )
    sandbox = pooled.create(request)
    assert waiting not in made
    assert (sandbox.sandbox_id, sandbox.container) == (request.sandbox_id, waiting)
    assert (sandbox.egress, sandbox.auto_resume) == (CLOSED, True)
    assert pooled.list() == [sandbox]
    told = init_of(containerd, waiting)
    assert told["accessToken"] == "mine"
    assert told["envVars"]["E2B_SANDBOX_ID"] == request.sandbox_id
    wait_until(lambda: pooled.pool.count == 1, "the next does not come")
    pooled.pause(request.sandbox_id)
    assert pooled.resume(request.sandbox_id, 0)[0].container == waiting
    containerd.ctr("tasks", "kill", "-s", "SIGKILL", waiting)
    wait_until(lambda: pooled.list() == [], "its end is not seen")


def test_what_waits_gives_up_its_slot(pooled: Node) -> None:
    made = [pooled.create(request_of(vcpus=2, access_token="")) for _ in range(3)]
    assert pooled.pool.count == 0
    assert len(pooled.list()) == 3
    with pytest.raises(HostError, match="in use"):
        pooled.create(request_of())
    assert [row.vcpus for row in made] == [2, 2, 2]


def test_the_maker_of_a_snapshot_gives_up_its_slot(warm: Node, double: CheckpointDouble) -> None:
    others: list[Sandbox] = []

    def fill_up() -> None:
        others.extend(warm.create(request_of(access_token="")) for _ in range(2))

    double.while_saving = fill_up
    first = warm.create(request_of())
    _settled(warm)
    assert {row.sandbox_id for row in warm.list()} == {row.sandbox_id for row in (first, *others)}
    assert warm.slots.free_count == 0


def test_what_dies_while_it_waits_is_removed(pooled: Node, containerd: RealContainerd) -> None:
    (waiting,) = containerd.traces()["tasks"]
    containerd.ctr("tasks", "kill", "-s", "SIGKILL", waiting)
    wait_until(lambda: not containerd.traces()["snapshots"], "it is not removed")
    assert pooled.pool.count == 0
    sandbox = pooled.create(request_of())
    assert snapshot_of(containerd, sandbox) != ""


def test_one_that_cannot_be_handed_out_is_replaced_by_a_restore(
    pooled: Node, containerd: RealContainerd
) -> None:
    (waiting,) = containerd.traces()["tasks"]
    rows = [line.split() for line in containerd.ctr("tasks", "list").splitlines()[1:]]
    root = Path("/proc", rows[0][1], "root")
    (root / "init.json").unlink()
    (root / "init.json").mkdir()  # its envd dies of the next word
    sandbox = pooled.create(request_of())
    assert sandbox.container != waiting
    assert snapshot_of(containerd, sandbox) != ""


def test_the_next_noded_parks_anew(
    templates: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    settings = replace(templates, pool=("good=1",))
    with opened_node(settings) as first:
        first.prepare_template(request_of())
        wait_until(lambda: first.pool.count == 1, "nothing is parked")
        sandbox = first.create(request_of())
        wait_until(lambda: first.pool.count == 1, "nothing is parked again")
        before = set(containerd.traces()["tasks"])
    with opened_node(settings) as second:
        try:
            wait_until(lambda: second.pool.count == 1, "nothing is parked anew")
            assert second.list() == [sandbox]
            assert set(containerd.traces()["tasks"]) & before == {sandbox.container}
            second.forget_template(GOOD)
            remove_all(second, containerd, settings)
        finally:
            second.slots.close_all()
