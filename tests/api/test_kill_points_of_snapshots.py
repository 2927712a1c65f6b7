"""noded killed (SIGKILL) at every point of a pause, a resume, a snapshot and a rollback.

What the next noded finds is the sandbox, running or paused as the point says: it can be paused,
resumed and killed, and then nothing of it is left. A fork is a snapshot and creates. The runtime is
runc and the shim's part a double; with our own shim, and a fake guest, every save is cut off too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_double import CheckpointDouble
from dying_node import (
    add_guest_addresses,
    order_of,
    saving_noded_dies,
    wait_until,
    write_config,
)
from kill_points import SAVING_POINTS
from own_netns import own_netns
from private_containerd import IMAGE as LAYERS
from private_containerd import PrivateContainerd
from real_containerd import RealContainerd, real_containerd
from shimmed_containerd import shimmed_containerd
from stand_in_images import import_stand_ins

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def containerd() -> Iterator[RealContainerd]:
    with own_netns(), real_containerd(Path(tempfile.mkdtemp(prefix="vmc"))) as running:
        add_guest_addresses()
        import_stand_ins(running)
        yield running


def test_there_are_as_many_points_as_the_issue_asks_for() -> None:
    assert len(SAVING_POINTS) >= 20
    assert {point.verb for point in SAVING_POINTS.values()} == {
        *("pause", "resume", "snapshot", "rollback")
    }


@pytest.mark.parametrize("name", SAVING_POINTS)
def test_noded_killed(
    name: str, containerd: RealContainerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(containerd.socket, "io.containerd.runc.v2", tmp_path)
    CheckpointDouble(config).install(monkeypatch.setattr)
    saving_noded_dies(name, containerd, config, tmp_path, order_of())


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    with shimmed_containerd(tmp_path_factory.mktemp("shimmed")) as daemon:
        yield daemon


SHIM_POINTS = [
    name
    for name, point in SAVING_POINTS.items()
    if point.call in ("checkpoint_task", "create_task", "start_task", "kill_task")
]


@pytest.mark.parametrize("name", SHIM_POINTS)
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
