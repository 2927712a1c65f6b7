"""noded's verbs that need snapshots with our own shim on a real containerd; the guest is a fake.

What a fake guest has of a memory is what its container runs, which starts anew when it is restored.
The races and refusals are test_node_snapshots'.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from dying_node import opened, wait_until, write_config
from private_containerd import IMAGE, PrivateContainerd
from shimmed_containerd import shimmed_containerd

from vmcell_api.config import ApiConfig
from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.node.build import SandboxRequest
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import PAUSED, RUNNING
from vmcell_api.node.snapshot_records import KEPT, new_snapshot_id
from vmcell_protos.errors import VmcellError

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    with shimmed_containerd(tmp_path_factory.mktemp("shimmed")) as daemon:
        yield daemon


@pytest.fixture
def config(shimmed: PrivateContainerd, tmp_path: Path) -> ApiConfig:
    written = write_config(str(shimmed.socket), "io.containerd.vmcell.v2", tmp_path)
    directories = {name: f"{shimmed.directory}/{name}" for name in ("run", "snapshots")}
    return replace(written, state_dir=directories["run"], snapshot_dir=directories["snapshots"])


@pytest.fixture
def node(config: ApiConfig, shimmed: PrivateContainerd) -> Iterator[Node]:
    """Whatever a test left is removed, and then nothing of it is there."""
    with opened(config) as node:
        yield node
        for sandbox in node.list():
            node.kill(sandbox.sandbox_id)
        for record in node.snapshots.records():
            node.snapshots.remove(record.snapshot_id)
        assert node.slots.free_count == 3
        assert [path for path in Path(config.snapshot_dir).iterdir() if path.name != ".noded"] == []
        wait_until(lambda: not _leftovers(shimmed), f"{_leftovers(shimmed)}")


def _leftovers(shimmed: PrivateContainerd) -> list[str]:
    return [row for row in shimmed.leftovers() if ".noded" not in row]


def _request(**options: object) -> SandboxRequest:
    values = {
        "sandbox_id": new_sandbox_id(),
        "template_id": "good",
        "image": IMAGE,
        "vcpus": 1,
        "memory_mib": 128,
        "timeout_ms": 600_000,
        "access_token": "t0ken",
    }
    return SandboxRequest(**{**values, **options})  # type: ignore[arg-type]  # test values


def _blobs(shimmed: PrivateContainerd) -> set[bytes]:
    return set(shimmed.ctr("-n", "vmcell", "content", "list", "-q").stdout.split())


def test_pause_and_resume_five_times(node: Node, shimmed: PrivateContainerd) -> None:
    blobs = _blobs(shimmed)
    sandbox = node.create(_request())
    for _ in range(5):
        paused = node.pause(sandbox.sandbox_id)
        assert paused.state == PAUSED
        assert not any("containerd-shim" in row for row in shimmed.leftovers())
        resumed, by_this = node.resume(sandbox.sandbox_id, 0)
        assert (resumed.state, by_this) == (RUNNING, True)
    # What the tests before had left may go meanwhile.
    assert _blobs(shimmed) <= blobs, "what containerd made of the checkpoints is gone"


def test_saves_at_once_and_after_one_that_was_cut_off(
    node: Node, shimmed: PrivateContainerd
) -> None:
    """What containerd makes of each, beside the snapshot, is the same blob."""
    blobs = _blobs(shimmed)
    sandboxes = [node.create(_request()) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            calls = [
                pool.submit(node.snapshot, row.sandbox_id, new_snapshot_id(KEPT))
                for row in sandboxes
            ]
            for call in calls:
                node.snapshots.remove(call.result().snapshot_id)
    done = shimmed.ctr(
        "-n", "vmcell", "content", "ingest", "left", stdin=tarfile.NUL * tarfile.BLOCKSIZE * 2
    )
    assert done.returncode == 0, done.stderr
    assert _blobs(shimmed) != blobs
    node.snapshots.remove(node.snapshot(sandboxes[0].sandbox_id, new_snapshot_id(KEPT)).snapshot_id)
    assert _blobs(shimmed) <= blobs


def test_snapshot_copies_and_rollback(node: Node, config: ApiConfig) -> None:
    sandbox = node.create(_request())
    record = node.snapshot(sandbox.sandbox_id, new_snapshot_id(KEPT))
    manifest = node.snapshots.manifest(record.snapshot_id)
    assert {"memory", "state.json"} <= {row.name for row in manifest.files}
    assert all(row.digest.startswith("blake2b:") for row in manifest.files)
    assert manifest.parent == ""
    copy = node.create(_request(snapshot_id=record.snapshot_id, access_token="other"))
    of_copy = node.snapshot(copy.sandbox_id, new_snapshot_id(KEPT))
    assert node.snapshots.manifest(of_copy.snapshot_id).parent == record.snapshot_id
    assert node.file_changes(record.snapshot_id, of_copy.snapshot_id) == []
    assert len(node.list()) == 2, "what was restored for that is gone"
    rolled, undo = node.rollback(sandbox.sandbox_id, record.snapshot_id, undo_life_ms=60_000)
    node.snapshots.remove(record.snapshot_id)
    assert node.get(sandbox.sandbox_id) == rolled
    undone, _ = node.rollback(sandbox.sandbox_id, undo.snapshot_id, undo_life_ms=60_000)
    assert node.get(sandbox.sandbox_id) == undone
    assert [row.sandbox_id for row in node.list()] == [sandbox.sandbox_id, copy.sandbox_id]


def test_a_damaged_snapshot_is_refused_by_the_shim(node: Node, config: ApiConfig) -> None:
    sandbox = node.create(_request())
    paused = node.pause(sandbox.sandbox_id)
    memory = Path(config.snapshot_dir, paused.snapshot_id, "memory")
    good = memory.read_bytes()
    memory.chmod(0o600)
    memory.write_bytes(b"x" + good[1:])
    with pytest.raises(VmcellError, match=r"memory of snapshot .* is damaged"):
        node.resume(sandbox.sandbox_id, 0)
    assert node.get(sandbox.sandbox_id) == paused
    memory.write_bytes(good)
    assert node.resume(sandbox.sandbox_id, 0)[1]


def test_memory_of_its_two_processes(node: Node, config: ApiConfig) -> None:
    sandbox = node.create(_request())
    _, processes = node.memory(sandbox.sandbox_id)
    state = Path(config.state_dir, "vmcell", sandbox.sandbox_id, "state.json")
    living = json.loads(state.read_text())
    assert [(row.name, row.pid) for row in processes] == [
        (name, living[name][0]) for name in ("shim", "vmm")
    ]
    for row in processes:
        assert 1 << 20 < row.own.pss <= row.own.rss
        assert row.own.private_dirty > 1 << 18
    living["vmm"][1] += 1  # another process by now
    state.write_text(json.dumps(living))
    with pytest.raises(VmcellError, match=r"vmm .* has ended"):
        node.memory(sandbox.sandbox_id)
