"""A service of its own for each test, both databases that the store knows, and for noded's tests a
containerd with images that stand in for guests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service
from checkpoint_double import CheckpointDouble
from dying_node import add_guest_addresses, write_config
from own_netns import own_netns
from private_postgres import PrivatePostgres, private_postgres
from real_containerd import RealContainerd, real_containerd
from saving_node import opened_node, remove_all
from stand_in_images import import_stand_ins

from vmcell_api.config import ApiConfig
from vmcell_api.node.node import Node


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ApiService]:
    with api_service(tmp_path) as running:
        yield running


# Not for the session: other modules look at the children that this process has.
@pytest.fixture(scope="module")
def postgres() -> Iterator[PrivatePostgres]:
    with private_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store/api.sqlite"
    server: PrivatePostgres = request.getfixturevalue("postgres")
    return server.database()


@pytest.fixture(scope="module")
def containerd() -> Iterator[RealContainerd]:
    with own_netns(), real_containerd(Path(tempfile.mkdtemp(prefix="vmc"))) as running:
        add_guest_addresses()
        import_stand_ins(running)
        yield running


@pytest.fixture
def config(containerd: RealContainerd, tmp_path: Path) -> ApiConfig:
    return write_config(containerd.socket, "io.containerd.runc.v2", tmp_path)


@pytest.fixture
def double(config: ApiConfig, monkeypatch: pytest.MonkeyPatch) -> CheckpointDouble:
    """The shim's part of snapshots, where the runtime is runc."""
    made = CheckpointDouble(config)
    made.install(monkeypatch.setattr)
    return made


@pytest.fixture
def node(config: ApiConfig, containerd: RealContainerd, double: CheckpointDouble) -> Iterator[Node]:
    """An opened node; whatever the test left is removed and must leave nothing."""
    with opened_node(config) as opened:
        try:
            yield opened
            remove_all(opened, containerd, config)
        finally:
            opened.slots.close_all()
