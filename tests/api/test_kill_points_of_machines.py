"""noded killed (SIGKILL) where a machine is there, or comes or goes, with our own shim.

The guest is a fake; what is looked at is whether shim, monitor and their files are gone as well.
The other points are test_kill_points.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deep import one_in
from dying_node import noded_dies, order_of, wait_until, write_config
from kill_points import NODED_POINTS
from private_containerd import IMAGE as LAYERS
from private_containerd import PrivateContainerd
from real_containerd import RealContainerd
from shimmed_containerd import shimmed_containerd

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    with shimmed_containerd(tmp_path_factory.mktemp("shimmed")) as daemon:
        yield daemon


# Where a machine is there, or comes or goes: the shim and its monitor must be gone as well.
SHIM_POINTS = [
    name for name, point in NODED_POINTS.items() if point.call.endswith(("_task", "initialise"))
]


@pytest.mark.parametrize("name", one_in(8, SHIM_POINTS))
def test_noded_killed_with_our_shim(name: str, shimmed: PrivateContainerd, tmp_path: Path) -> None:
    containerd = RealContainerd(
        folder=shimmed.directory, socket=str(shimmed.socket), log=shimmed.log
    )
    config = write_config(containerd.socket, "io.containerd.vmcell.v2", tmp_path)
    noded_dies(name, containerd, config, tmp_path, order_of(LAYERS))
    wait_until(lambda: not shimmed.leftovers(), f"{shimmed.leftovers()}")
