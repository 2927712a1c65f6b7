"""A shim or its VMM is killed at every point of a Checkpoint and of a Create that goes on from one.

The container that was saved goes on, or its task ends with 137 and can be deleted; no half of a
snapshot is ever visible; nothing is left.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_kill_points import (
    COMMIT_POINTS,
    EXPORT_POINTS,
    RESTORE_POINTS,
    SAVE_POINTS,
    SHIM,
    VMM,
)
from containerd_release import DEBIAN, find_release
from deep import one_in
from private_containerd import IMAGE, PrivateContainerd
from shim_harness import wait_until
from snapshot_calls import OWN_OPTIONS

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_protos.wellknown import Any, Empty
from vmcell_shim.client import TtrpcClient
from vmcell_shim.digests import Digests
from vmcell_shim.snapshot_store import open_snapshot, remove_snapshot

pytestmark = pytest.mark.root

SAVED = "docker.io/vmcell-test/saved:1"
PATCH = "import checkpoint_kill_points; checkpoint_kill_points.arm()"
# What a draft has written by then has gone with the sandbox; before that it is swept by the next.
NOT_NOTED = ("a draft",)
VMM_SAVE_POINTS = (
    "memory copied",
    "told to stand still",
    "stands still",
    "written",
    "disk copied",
    "told to go on",
    "goes on",
)
VMM_RESTORE_POINTS = (
    "spawned",
    "says hello",
    "devices known",
    "adopted",
    "created",
    "to be woken",
    "woken",
)


class Node:
    """A containerd whose shims die when they are told to."""

    def __init__(self, daemon: PrivateContainerd) -> None:
        self.daemon = daemon
        self.snapshots = daemon.directory / "snapshots"
        self.doom = daemon.directory / "doom"

    def kill(self, who: str, point: str) -> None:
        self.doom.write_text(json.dumps([who, point]))

    def begin(self) -> None:
        done = self.daemon.run("c1", "sleep", "600", flags=("-d",))
        assert done.returncode == 0, done.stderr

    def client(self, name: str) -> TtrpcClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect((self._bundle(name) / "address").read_text().removeprefix("unix://"))
        return TtrpcClient(sock, "the shim")

    def save(self, snapshot_id: str) -> None:
        """A snapshot of this host, which `ctr` cannot ask for. Raises VmcellError."""
        client = self.client("c1")
        options = Any(type_url=OWN_OPTIONS, value=json.dumps({"snapshot_id": snapshot_id}).encode())
        request = task.CheckpointTaskRequest(id="c1", options=options)
        try:
            client.call("containerd.task.v2.Task", "Checkpoint", request, Empty, 30)
        finally:
            client.close()

    def ended(self, name: str) -> None:
        """By the death of its shim or VMM, as everybody is told."""
        wait_until(lambda: self.daemon.status(name) in ("", "STOPPED"), "the exit", 15)
        if self.daemon.status(name) == "STOPPED":
            assert b"exit code 137" in self.daemon.ctr("task", "delete", name).stderr

    def remove(self, name: str) -> None:
        """containerd forgets a task whose shim has died when it has run `delete` for it."""
        self.daemon.ctr("task", "delete", "-f", name)
        wait_until(lambda: not self._bundle(name).exists(), "the bundle's removal", 15)
        assert self.daemon.ctr("container", "delete", name).returncode == 0

    def _bundle(self, name: str) -> Path:
        tasks = self.daemon.directory / "state/io.containerd.runtime.v2.task"
        return tasks / "default" / name

    def visible(self) -> list[str]:
        if not self.snapshots.exists():
            return []
        return [name for name in os.listdir(self.snapshots) if not name.startswith(".")]

    def hidden(self) -> list[Path]:
        return list(self.snapshots.glob(".*"))

    def whole(self, snapshot_id: str) -> None:
        directory = str(self.snapshots)
        digests = Digests(str(self.daemon.directory / "digests"))
        open_snapshot(directory, snapshot_id, digests).close()

    def clean(self) -> None:
        """Nothing is left when containers, images and snapshots are removed as usual."""
        for name in ("c1", "c2"):
            self.daemon.ctr("task", "delete", "-f", name)
            self.daemon.ctr("container", "delete", name)
        wait_until(lambda: self.daemon.leftovers() == [], f"an end of {self.daemon.leftovers()}")
        for name in self.daemon.ctr("image", "ls", "-q").stdout.decode().split():
            if name != IMAGE:
                assert self.daemon.ctr("image", "rm", "--sync", name).returncode == 0
        for name in self.visible():
            remove_snapshot(str(self.snapshots), name)
        # containerd's own directory for a Create whose shim died stays, whatever the runtime.
        shutil.rmtree(self.daemon.directory / "tmp")
        (self.daemon.directory / "tmp").mkdir()


@contextmanager
def running(directory: Path) -> Iterator[Node]:
    daemon = PrivateContainerd(
        directory, fake_guest=True, release=find_release(DEBIAN), patch=PATCH
    )
    (directory / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory / "tmp"))
        daemon.start()
    try:
        daemon.import_image()
        yield Node(daemon)
    finally:
        daemon.kill()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("doom")) as node:
        yield node


@pytest.fixture
def node(started: Node) -> Iterator[Node]:
    """Afterwards it works as ever, and what the dead have left goes with the next."""
    yield started
    assert not started.doom.exists(), "nobody came to the point"
    started.clean()
    started.begin()
    started.save("after")
    assert started.daemon.status("c1") == "RUNNING"
    assert started.visible() == ["after"]
    assert started.hidden() == []
    started.clean()


@pytest.mark.parametrize("point", one_in(4, [*SAVE_POINTS, *COMMIT_POINTS]))
def test_the_shim_while_it_makes_a_snapshot(node: Node, point: str) -> None:
    node.begin()
    pid = node.daemon.pid("c1")
    node.kill(SHIM, point)
    with pytest.raises(VmcellError):
        node.save("s1")
    node.ended("c1")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the VMM's end")
    if point == "committed":
        assert node.visible() == ["s1"]
        node.whole("s1")
    else:
        assert node.visible() == []
    if point not in NOT_NOTED:
        wait_until(lambda: node.hidden() == [], f"the removal of {node.hidden()}")


@pytest.mark.parametrize("point", one_in(4, [*SAVE_POINTS, *EXPORT_POINTS]))
def test_the_shim_while_it_makes_a_checkpoint_image(node: Node, point: str) -> None:
    node.begin()
    pid = node.daemon.pid("c1")
    node.kill(SHIM, point)
    done = node.daemon.ctr("task", "checkpoint", "c1")
    assert done.returncode != 0
    node.ended("c1")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the VMM's end")
    assert node.visible() == []
    assert list((node.daemon.directory / "tmp").iterdir()) == []
    if point not in NOT_NOTED:
        wait_until(lambda: node.hidden() == [], f"the removal of {node.hidden()}")


@pytest.mark.parametrize("point", one_in(4, VMM_SAVE_POINTS))
def test_the_vmm_while_it_is_saved(node: Node, point: str) -> None:
    """What was written by then may be a snapshot, or there is none."""
    node.begin()
    node.kill(VMM, point)
    try:
        node.save("s1")
    except VmcellError:
        assert node.visible() == []
    else:
        assert node.visible() == ["s1"]
        node.whole("s1")
    assert node.hidden() == []
    node.ended("c1")


def restored(node: Node) -> str:
    """What `ctr` says of it, "" when it runs."""
    done = node.daemon.ctr("containers", "restore", "--live", "c2", SAVED)
    return done.stderr.decode() if done.returncode else ""


def save_to_image(node: Node) -> None:
    node.begin()
    done = node.daemon.ctr("containers", "checkpoint", "--task", "c1", SAVED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("point", one_in(4, RESTORE_POINTS))
def test_the_shim_while_it_restores(node: Node, point: str) -> None:
    """The one that was saved does not notice, and another can be restored."""
    save_to_image(node)
    node.kill(SHIM, point)
    assert restored(node) != ""
    node.ended("c2")
    node.remove("c2")
    assert node.daemon.status("c1") == "RUNNING"
    assert node.visible() == []
    assert restored(node) == ""
    assert node.daemon.status("c2") == "RUNNING"
    assert node.hidden() == []


@pytest.mark.parametrize("point", one_in(4, VMM_RESTORE_POINTS))
def test_the_vmm_while_it_is_restored(node: Node, point: str) -> None:
    save_to_image(node)
    node.kill(VMM, point)
    restored(node)
    node.ended("c2")
    node.remove("c2")
    assert node.daemon.status("c1") == "RUNNING"
    assert restored(node) == ""
    assert node.daemon.status("c2") == "RUNNING"
    assert node.hidden() == []
