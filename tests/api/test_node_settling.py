"""What noded makes of pauses and snapshots that an earlier one left, or that containerd cut off.

The runtime is runc and the shim's part a double, as in test_node_snapshots.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_double import CheckpointDouble
from dying_node import wait_until
from real_containerd import RealContainerd
from saving_node import (
    TOKEN,
    init_of,
    labels_of,
    opened_node,
    remove_all,
    request_of,
)

from vmcell_api.config import ApiConfig
from vmcell_api.node import removal, sandbox_files
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import PAUSED, RUNNING
from vmcell_api.node.snapshot_records import KEPT, PAUSE, UNDO, new_snapshot_id
from vmcell_protos.errors import HostError

pytestmark = pytest.mark.root


def test_the_next_noded_knows_paused_sandboxes_and_snapshots(
    config: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    with opened_node(config) as first:
        sandbox = first.create(request_of(auto_resume=True))
        snapshot = first.snapshot(sandbox.sandbox_id, new_snapshot_id(KEPT))
        rolled, undo = first.rollback(sandbox.sandbox_id, snapshot.snapshot_id, undo_life_ms=60_000)
        paused = first.pause(sandbox.sandbox_id)
    for name in ("access-token", "environment.json"):  # a host that was started anew
        (sandbox_files.folder_of(config.state_dir, rolled.container) / name).unlink()
    with opened_node(config) as second:
        try:
            assert second.list() == [paused]
            kinds = {row.snapshot_id: row.kind for row in second.snapshots.records()}
            assert kinds == {
                snapshot.snapshot_id: KEPT,
                undo.snapshot_id: UNDO,
                paused.snapshot_id: PAUSE,
            }
            assert second.slots.free_count == 3
            resumed, _ = second.resume(sandbox.sandbox_id, 0, by_request=True)
            assert resumed.container == rolled.container
            assert init_of(containerd, rolled.container)["accessToken"] == TOKEN
            second.pause(sandbox.sandbox_id)
            second.resume(sandbox.sandbox_id, 0)
            remove_all(second, containerd, config)
        finally:
            second.slots.close_all()


def test_a_sandbox_whose_pause_was_cut_off_runs_on(
    config: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    with opened_node(config) as first:
        sandbox = first.create(request_of())
        record = first._suspension.begin(sandbox, new_snapshot_id(PAUSE), kind=PAUSE)
    assert containerd.ctr("tasks", "list").split()[-1] == "PAUSED"
    with opened_node(config) as second:
        try:
            assert second.list() == [sandbox]
            assert containerd.ctr("tasks", "list").split()[-1] == "RUNNING"
            assert not second.snapshots.is_whole(record.snapshot_id)
            remove_all(second, containerd, config)
        finally:
            second.slots.close_all()


def test_a_sandbox_whose_snapshot_is_gone_is_lost(
    config: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    with opened_node(config) as first:
        lost = first.pause(first.create(request_of()).sandbox_id)
        other = first.create(request_of())
        assert other.slot_number != lost.slot_number
    Path(config.snapshot_dir, lost.snapshot_id, "manifest.json").unlink()
    with opened_node(config) as second:
        try:
            assert second.list() == [other]
            remove_all(second, containerd, config)
        finally:
            second.slots.close_all()


def test_a_sandbox_that_ended_meanwhile_pauses_if_it_says_so(
    config: ApiConfig, containerd: RealContainerd, double: CheckpointDouble
) -> None:
    with opened_node(config) as first:
        kept = first.create(request_of(timeout_ms=1000, pause_on_timeout=True)).sandbox_id
        first.create(request_of(timeout_ms=1000))
    wait_until(_later_than(time.monotonic() + 1.2), "time stands still")
    with opened_node(config) as second:
        try:
            wait_until(
                lambda: [row.state for row in second.list()] == [PAUSED], "it does not pause"
            )
            assert second.list()[0].sandbox_id == kept
            remove_all(second, containerd, config)
        finally:
            second.slots.close_all()


def _later_than(moment: float) -> Callable[[], bool]:
    return lambda: time.monotonic() > moment


# Calls whose outcome nobody knows.


def _failing(monkeypatch: pytest.MonkeyPatch, name: str, *numbers: int, done: bool) -> None:
    """The calls of these numbers fail, and what they ask for is `done` all the same."""
    original, calls = getattr(Containerd, name), itertools.count(1)

    def call(self: Containerd, *arguments: object, **options: object) -> object:
        fails = next(calls) in numbers
        if not fails or done:
            original(self, *arguments, **options)
        if fails:
            raise HostError(f"{name}: nobody answers", code="deadline_exceeded")
        return None

    monkeypatch.setattr(Containerd, name, call)


@pytest.mark.parametrize("done", [True, False])
def test_a_label_of_which_nobody_knows_whether_it_was_written(
    config: ApiConfig,
    containerd: RealContainerd,
    double: CheckpointDouble,
    monkeypatch: pytest.MonkeyPatch,
    done: bool,
) -> None:
    with opened_node(config) as first:
        sandbox_id = first.create(request_of()).sandbox_id
        # `pausing`, then `paused`.
        with monkeypatch.context() as patch:
            _failing(patch, "set_labels", 2, done=done)
            with pytest.raises(HostError, match="nobody answers"):
                first.pause(sandbox_id)
        assert first.get(sandbox_id).state == RUNNING
        assert containerd.ctr("tasks", "list").split()[-1] == "RUNNING"
        assert labels_of(containerd, sandbox_id)["io.vmcell.state"] == "running"
        paused = first.pause(sandbox_id)
        with monkeypatch.context() as patch:
            _failing(patch, "set_labels", 1, done=done)
            with pytest.raises(HostError, match="nobody answers"):
                first.resume(sandbox_id, 0)
        assert first.get(sandbox_id) == paused
        assert labels_of(containerd, sandbox_id)["io.vmcell.state"] == "paused"
    with opened_node(config) as second:
        try:
            (found,) = second.list()
            assert (found.state, found.snapshot_id) == (PAUSED, paused.snapshot_id)
            assert second.resume(sandbox_id, 0)[1]
            remove_all(second, containerd, config)
        finally:
            second.slots.close_all()


def test_a_sandbox_that_is_not_let_run_on_is_tried_again(
    node: Node,
    containerd: RealContainerd,
    double: CheckpointDouble,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(removal, "RETRY_S", 0.1)
    _failing(monkeypatch, "resume_task", 1, 2, done=False)

    def fail() -> None:
        raise HostError("no space left on device")

    double.while_saving = fail
    sandbox_id = node.create(request_of()).sandbox_id
    with pytest.raises(HostError, match="no space left"):
        node.pause(sandbox_id)
    wait_until(lambda: containerd.ctr("tasks", "list").split()[-1] == "RUNNING", "it stands still")
    double.while_saving = lambda: None
    assert node.pause(sandbox_id).state == PAUSED
