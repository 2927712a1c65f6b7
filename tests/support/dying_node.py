"""noded as a process that is killed at a point, and the look at what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kill_points import NODED_POINTS, PAUSED, SAVING_POINTS, WHOLE
from real_containerd import RealContainerd
from stand_in_images import GOOD

from vmcell_api.config import ApiConfig
from vmcell_api.egress import Egress
from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.node.__main__ import build_node
from vmcell_api.node.node import Node
from vmcell_api.node_channel import NodeUnreachable
from vmcell_api.node_client import NewSandbox, NodeClient

PATIENCE_S = 60.0
PROGRAM = Path(__file__).with_name("doomed_process.py")
RULES = Egress(allow_internet=False, allow_out=("93.184.216.0/24",))
SETTINGS = (
    *("containerd_socket", "runtime", "state_dir", "node_socket", "slot_count", "api_uid"),
    *("database_url", "start_timeout_s", "volumes_dir", "upload_dir", "build_dir", "metrics_dir"),
    *("snapshot_dir", "template_snapshots"),
)


def add_guest_addresses() -> None:
    """The addresses of all slots' guests on this namespace's loopback."""
    for number in range(1, 4):
        subprocess.run(f"ip addr add 10.88.0.{2 * number + 1}/32 dev lo".split(), check=True)


def write_config(socket: str, runtime: str, tmp_path: Path, *, snapshot_dir: str = "") -> ApiConfig:
    """The settings, also as `api.toml` in the folder."""
    config = ApiConfig(
        containerd_socket=socket,
        runtime=runtime,
        state_dir=str(tmp_path / "run"),
        node_socket=str(tmp_path / "noded.sock"),
        database_url=f"sqlite:///{tmp_path}/api.sqlite",
        slot_count=3,
        start_timeout_s=30,
        api_uid=os.geteuid(),
        volumes_dir=str(tmp_path / "volumes"),
        snapshot_dir=snapshot_dir or str(tmp_path / "snapshots"),
        template_snapshots=0,
        upload_dir=str(tmp_path / "uploads"),
        build_dir=str(tmp_path / "builds"),
        metrics_dir="",
    )
    rows = [f"{name} = {json.dumps(getattr(config, name))}\n" for name in SETTINGS]
    (tmp_path / "api.toml").write_text("".join(rows))
    return config


def wait_until(what: Callable[[], object], why: str) -> None:
    """Returns when `what()` is true; AssertionError with `why` after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


@contextlib.contextmanager
def doomed(what: str, point: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that dies at `point`; whatever happens it is gone afterwards."""
    with (folder / "doomed.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), what, point],
            env={
                **os.environ,
                "VMCELL_API_CONFIG": str(folder / "api.toml"),
                "VMCELL_ZYGOTE": "",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def opened(config: ApiConfig) -> Iterator[Node]:
    """The next noded, in this process; its slots are removed afterwards."""
    node = build_node(config)
    node.open()
    try:
        yield node
    finally:
        node.close()
        node.slots.close_all()


def nothing_left(node: Node, containerd: RealContainerd) -> None:
    """Asserts that there is no trace of a sandbox on this host."""
    # A task that was told to end may take a moment; the node is told when it has.
    wait_until(lambda: not node.list(), "a sandbox is left")
    wait_until(lambda: not any(containerd.traces().values()), f"{containerd.traces()}")
    wait_until(lambda: node.slots.free_count == 3, "a slot is left")
    folder = Path(node._state_dir, ".noded")
    assert not folder.exists() or not list(folder.iterdir())
    wait_until(lambda: not _shims(containerd), "a shim is left")
    table = subprocess.run(
        ["nft", "list", "table", "inet", "vmcell"], capture_output=True, text=True, check=True
    ).stdout
    assert "rules_" not in table, "a sandbox's rules are left"
    for number in range(1, 4):
        assert f'"vmc{number}" : accept' in table


def _shims(containerd: RealContainerd) -> str:
    command = ["pgrep", "-f", f"containerd-shim-runc-v2.*{containerd.socket}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def order_of(image: str = GOOD) -> NewSandbox:
    """A create with rules that would be seen if they stayed."""
    return NewSandbox(
        sandbox_id=new_sandbox_id(),
        template_id="good",
        image=image,
        vcpus=1,
        memory_mib=128,
        timeout_s=600,
        egress=RULES,
    )


def _answers(client: NodeClient) -> bool:
    """The socket is there a moment before somebody listens."""
    try:
        client.list()
    except NodeUnreachable:
        return False
    return True


def _create_and_kill(client: NodeClient, order: NewSandbox) -> None:
    client.create(order)
    client.kill(order.sandbox_id)


SNAPSHOT_ID = "snap-" + "0" * 20


def _ask_for(client: NodeClient, verb: str, order: NewSandbox) -> None:
    """What comes before the verb, and the verb."""
    client.create(order)
    if verb in ("pause", "resume"):
        client.pause(order.sandbox_id)
    else:
        client.make_snapshot(order.sandbox_id, SNAPSHOT_ID)
    if verb == "resume":
        client.resume(order.sandbox_id, 600)
    if verb == "rollback":
        client.rollback(order.sandbox_id, SNAPSHOT_ID, undo_life_s=600)


def saving_noded_dies(
    name: str, containerd: RealContainerd, config: ApiConfig, tmp_path: Path, order: NewSandbox
) -> None:
    """The same at a point of pause, resume, snapshot or rollback: the sandbox lives on."""
    point = SAVING_POINTS[name]
    client = NodeClient(config.node_socket, create_timeout_s=60)
    with doomed("noded", name, tmp_path) as noded, contextlib.closing(client):
        wait_until(lambda: noded.poll() is not None or _answers(client), "noded does not answer")
        with pytest.raises(NodeUnreachable):
            _ask_for(client, point.verb, order)
        assert noded.wait(PATIENCE_S) == -signal.SIGKILL, (tmp_path / "doomed.log").read_text()
    with opened(config) as node:
        (sandbox,) = node.list()
        assert (sandbox.sandbox_id, sandbox.egress) == (order.sandbox_id, RULES)
        assert sandbox.state == ("paused" if point.leaves == PAUSED else "running")
        live = [] if sandbox.state == "paused" else [sandbox.container]
        assert containerd.traces()["tasks"] == live
        assert containerd.traces()["containers"] == [sandbox.container]
        assert node.slots.free_count == 3 - len(live)
        node.resume(order.sandbox_id, 600_000)
        node.pause(order.sandbox_id)
        node.resume(order.sandbox_id, 600_000)
        node.kill(order.sandbox_id)
        kept = [record.snapshot_id for record in node.snapshots.records()]
        assert kept in ([], [SNAPSHOT_ID])
        for snapshot_id in kept:
            node.snapshots.remove(snapshot_id)
        nothing_left(node, containerd)
        folder = Path(config.snapshot_dir)
        left = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        assert left + list((folder / ".noded").rglob("*.*")) == []


def noded_dies(
    name: str, containerd: RealContainerd, config: ApiConfig, tmp_path: Path, order: NewSandbox
) -> None:
    """noded dies at the point of that name, and the next one finds what it must."""
    point = NODED_POINTS[name]
    client = NodeClient(config.node_socket, create_timeout_s=60)
    with doomed("noded", name, tmp_path) as noded, contextlib.closing(client):
        wait_until(lambda: noded.poll() is not None or _answers(client), "noded does not answer")
        with pytest.raises(NodeUnreachable):
            _create_and_kill(client, order)
        assert noded.wait(PATIENCE_S) == -signal.SIGKILL, (tmp_path / "doomed.log").read_text()
    with opened(config) as node:
        if point.leaves == WHOLE:
            (sandbox,) = node.list()
            assert (sandbox.sandbox_id, sandbox.egress) == (order.sandbox_id, RULES)
            assert containerd.traces()["tasks"] == [order.sandbox_id]
            node.kill(order.sandbox_id)
        nothing_left(node, containerd)
