"""Task.Checkpoint and a Create that goes on from it, over ttrpc, with a fake guest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from shim_harness import Shim, refused, wait_until
from snapshot_calls import (
    OWN_OPTIONS,
    RUNC_OPTIONS,
    checkpoint,
    disk_of,
    end,
    handle,
    made,
    opened,
    pause,
    restore,
    resume,
    save,
    snapshots,
    start,
)

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_shim.adoption import name_cgroup
from vmcell_shim.snapshot_store import remove_snapshot

AT = 40 << 20


# ---- saved, and on ------------------------------------------------------------------------------


def test_saved_while_it_goes_on(shim: Shim) -> None:
    start(shim)
    save(shim)
    assert shim.state().status == task.TaskStatus_RUNNING
    with opened("s1") as snapshot:
        manifest = snapshot.manifest
        assert (manifest.container_id, manifest.parent, manifest.terminal) == ("c1", "", False)
        assert (manifest.memory_mib, manifest.vcpus, manifest.macs) == (64, 1, ())
        assert (
            json.loads(os.pread(snapshot.memory_fd, 4096, 0).rstrip(b"\0"))["container_id"] == "c1"
        )
    end(shim)
    assert shim.left_behind() == []
    assert snapshots(shim) == ["s1"]
    # It is no pause: nobody is told of one.
    shim.containerd.wait_topics("create", "start", "exit", "delete")


def test_saved_and_paused(shim: Shim) -> None:
    start(shim)
    save(shim, then="pause")
    assert shim.state().status == task.TaskStatus_PAUSED
    assert handle(shim).stands_still
    resume(shim)
    assert shim.state().status == task.TaskStatus_RUNNING
    assert not shim.registry.container("c1").guest.stands_still
    end(shim)
    shim.containerd.wait_topics("create", "start", "paused", "resumed", "exit", "delete")


def test_killed_after_it_was_saved_and_paused(shim: Shim) -> None:
    start(shim)
    save(shim, then="pause")
    end(shim)
    assert shim.left_behind() == []
    shim.containerd.wait_topics("create", "start", "paused", "exit", "delete")
    with opened("s1"):
        pass


def test_a_paused_one_is_saved(shim: Shim) -> None:
    start(shim)
    pause(shim)
    checkpoint(shim, path=made(shim, "image"))
    assert shim.state().status == task.TaskStatus_PAUSED
    save(shim, "s1", then="pause")
    assert shim.state().status == task.TaskStatus_PAUSED
    save(shim, "s2", then="run")
    assert shim.state().status == task.TaskStatus_RUNNING
    end(shim)
    shim.containerd.wait_topics("create", "start", "paused", "resumed", "exit", "delete")


def test_saved_ten_times(shim: Shim) -> None:
    start(shim)
    for number in range(10):
        save(shim, f"s{number}")
    assert shim.state().status == task.TaskStatus_RUNNING
    end(shim)
    for number in range(10):
        with opened(f"s{number}"):
            pass


def test_signals_are_held_while_it_stands_still(shim: Shim) -> None:
    start(shim)
    save(shim, then="pause")
    shim.kill(15)
    assert shim.state().status == task.TaskStatus_PAUSED
    resume(shim)
    assert shim.wait() == 143


def test_an_exec_is_saved_with_it_and_goes_on(shim: Shim) -> None:
    start(shim)
    shim.add_exec("e1", "/bin/sh", "-c", "sleep 600")
    shim.start("e1")
    save(shim)
    shim.kill(15, "e1")
    assert shim.wait("e1") == 143
    end(shim)


# ---- restored -----------------------------------------------------------------------------------


def test_restored(shim: Shim, other: Shim) -> None:
    start(shim, "/bin/sh", "-c", "echo here; exec sleep 600")
    save(shim)
    end(shim)
    out = shim.directory / "out"
    restore(other, shim, stdout=f"file://{out}")
    assert other.state(container_id="c2").status == task.TaskStatus_CREATED
    assert out.read_text() == ""
    other.start(container_id="c2")
    wait_until(lambda: out.read_text() == "here\n", "the restored container's output")
    assert other.state(container_id="c2").status == task.TaskStatus_RUNNING
    end(other, "c2")
    assert shim.left_behind() == []
    other.containerd.wait_topics("create", "start", "exit", "delete")


def test_restored_beside_the_one_that_was_saved(shim: Shim, other: Shim) -> None:
    start(shim)
    save(shim)
    restore(other, shim)
    other.start(container_id="c2")
    assert shim.state().pid != other.state(container_id="c2").pid
    end(shim)
    assert other.state(container_id="c2").status == task.TaskStatus_RUNNING
    end(other, "c2")
    assert shim.left_behind() == []


def test_a_restored_one_is_saved(shim: Shim, other: Shim) -> None:
    start(shim)
    save(shim)
    restore(other, shim)
    other.start(container_id="c2")
    save(other, "s2", container_id="c2")
    end(other, "c2")
    end(shim)
    with opened("s2") as snapshot:
        assert (snapshot.manifest.container_id, snapshot.manifest.parent) == ("c2", "s1")
    restore(other, shim, "s2", container_id="c3")
    other.start(container_id="c3")
    end(other, "c3")


def test_a_restored_one_that_is_never_started(shim: Shim, other: Shim) -> None:
    start(shim)
    save(shim)
    end(shim)
    restore(other, shim)
    with refused("failed_precondition"):
        save(other, "s2", container_id="c2")
    other.delete(container_id="c2")
    assert shim.left_behind() == []
    assert snapshots(shim) == ["s1"]


def test_the_snapshot_goes_while_one_runs_from_it(shim: Shim, other: Shim) -> None:
    start(shim)
    save(shim)
    restore(other, shim)
    # A save begins with a copy of the memory it came from.
    remove_snapshot(str(shim.directory / "snapshots"), "s1")
    other.start(container_id="c2")
    save(other, "s2", container_id="c2")
    end(other, "c2")
    end(shim)
    assert snapshots(shim) == ["s2"]


def test_disks(shim: Shim, other: Shim) -> None:
    """What is written after the snapshot is not in it; who goes on from it has a disk apart."""
    start(shim)
    write(disk_of(shim, "c1"), b"before")
    save(shim)
    write(disk_of(shim, "c1"), b"later!")
    restore(other, shim)
    assert read(disk_of(shim, "c2")) == b"before"
    write(disk_of(shim, "c2"), b"second")
    assert read(shim.directory / "snapshots/s1/disk") == b"before"
    assert read(disk_of(shim, "c1")) == b"later!"
    with opened("s1"):
        pass
    # Holes stay holes: 64 MiB are not written three times.
    assert 512 * os.stat(disk_of(shim, "c2")).st_blocks < 16 << 20
    end(shim)
    end(other, "c2")


def write(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(AT)
        file.write(data)


def read(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(AT)
        return file.read(6)


def test_a_read_only_root(shim: Shim, other: Shim) -> None:
    path = str(shim.directory / "root")
    start(shim, root={"path": path, "readonly": True})
    save(shim)
    assert sorted(os.listdir(shim.directory / "snapshots/s1")) == [
        "manifest.json",
        "memory",
        "state.json",
    ]
    restore(other, shim, root={"path": path, "readonly": True})
    other.start(container_id="c2")
    end(other, "c2")
    with pytest.raises(VmcellError, match="has a root that is read-only"):
        restore(other, shim)
    end(shim)


# ---- by way of containerd's content store --------------------------------------------------------


def test_exported_and_imported(shim: Shim, other: Shim) -> None:
    start(shim)
    write(disk_of(shim, "c1"), b"before")
    directory = made(shim, "image")
    checkpoint(shim, path=directory)
    assert shim.state().status == task.TaskStatus_RUNNING
    assert snapshots(shim) == []
    assert sorted(os.listdir(directory)) == [
        "disk.packed",
        "manifest.json",
        "memory.packed",
        "state.json.packed",
    ]
    assert sum(path.stat().st_size for path in directory.iterdir()) < 16 << 20
    end(shim)
    restore(other, shim, "", checkpoint=directory)
    other.start(container_id="c2")
    assert read(disk_of(shim, "c2")) == b"before"
    save(other, "s2", container_id="c2")
    with opened("s2") as snapshot:
        assert snapshot.manifest.parent == ""
    end(other, "c2")
    assert snapshots(shim) == ["s2"]
    assert shim.left_behind() == []


def test_a_checkpoint_of_one_that_came_from_a_snapshot(shim: Shim, other: Shim) -> None:
    """Its spec comes along, and names the snapshot still."""
    start(shim)
    save(shim)
    restore(other, shim)
    other.start(container_id="c2")
    directory = made(shim, "image")
    checkpoint(other, path=directory, container_id="c2")
    end(other, "c2")
    end(shim)
    restore(other, shim, "s1", checkpoint=directory, container_id="c3")
    other.start(container_id="c3")
    end(other, "c3")


def test_what_containerd_has_laid_out_goes_with_the_create(shim: Shim, other: Shim) -> None:
    """It makes a directory for each Create and forgets it; anybody else's stays."""
    start(shim)
    kept = made(shim, "image")
    checkpoint(shim, path=kept)
    end(shim)
    for number in (1, 2):
        laid_out = shim.directory / f"ctrd-checkpoint{number}"
        shutil.copytree(kept, laid_out)
        if number == 2:
            (laid_out / "manifest.json").write_bytes(b"")
            with refused("data_loss"):
                restore(other, shim, "", checkpoint=laid_out)
        else:
            restore(other, shim, "", checkpoint=laid_out)
            other.delete(container_id="c2")
        assert not laid_out.exists()
    restore(other, shim, "", checkpoint=kept)
    other.delete(container_id="c2")
    assert len(os.listdir(kept)) == 4


CGROUPS = {
    "": "",
    "/default/c1": "/default/c2",
    "c1": "c2",
    "/a/b/c/": "/a/b/c/c2",
    "system.slice:nerdctl:c1": "system.slice:nerdctl:c2",
}


@pytest.mark.parametrize("path", CGROUPS)
def test_the_cgroup_is_named_like_the_container(path: str) -> None:
    spec = {"linux": {"cgroupsPath": path}} if path else {}
    name_cgroup(spec, "c2")
    assert spec.get("linux", {}).get("cgroupsPath", "") == CGROUPS[path]


@pytest.mark.parametrize("path", ["", "/nonexistent"])
def test_neither_a_snapshot_nor_a_directory(shim: Shim, path: str) -> None:
    start(shim)
    with pytest.raises(VmcellError, match="neither a snapshot nor a directory"):
        checkpoint(shim, path=path)
    assert shim.state().status == task.TaskStatus_RUNNING


def test_a_directory_that_is_not_empty(shim: Shim) -> None:
    start(shim)
    directory = made(shim, "image")
    (directory / "memory.packed").write_bytes(b"mine")
    with pytest.raises(VmcellError, match="File exists"):
        checkpoint(shim, path=directory)
    assert os.listdir(directory) == ["memory.packed"]
    assert (directory / "memory.packed").read_bytes() == b"mine"
    assert snapshots(shim) == []
    assert shim.state().status == task.TaskStatus_RUNNING


# ---- options ------------------------------------------------------------------------------------


def runc_options(**values: Any) -> bytes:
    return task.RuncCheckpointOptions(**values).encode()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize(
    "values",
    [{}, {"file_locks": True, "open_tcp": True, "external_unix_sockets": True, "terminal": True}],
)
def test_what_ctr_sends(shim: Shim, values: dict[str, Any], paused: bool) -> None:
    start(shim)
    if paused:
        pause(shim)
    checkpoint(shim, runc_options(**values), RUNC_OPTIONS, path=made(shim, "image"))
    wanted = task.TaskStatus_PAUSED if paused else task.TaskStatus_RUNNING
    assert shim.state().status == wanted
    end(shim)


@pytest.mark.parametrize("paused", [False, True])
def test_exit_after_the_checkpoint(shim: Shim, other: Shim, paused: bool) -> None:
    start(shim)
    if paused:
        pause(shim)
    directory = made(shim, "image")
    checkpoint(shim, runc_options(exit=True), RUNC_OPTIONS, path=directory)
    assert shim.wait() == 137
    shim.delete()
    assert shim.left_behind() == []
    shim.containerd.wait_topics("create", "start", "paused", "exit", "delete")
    restore(other, shim, "", checkpoint=directory)
    other.start(container_id="c2")
    end(other, "c2")


CRIU_ONLY: list[dict[str, Any]] = [
    {"image_path": "/tmp/image"},
    {"work_path": "/tmp/work"},
    {"empty_namespaces": ["network"]},
    {"cgroups_mode": "soft"},
]


@pytest.mark.parametrize("values", CRIU_ONLY, ids=lambda values: next(iter(values)))
def test_what_is_crius_is_refused_by_name(shim: Shim, values: dict[str, Any]) -> None:
    start(shim)
    (name,) = values
    with pytest.raises(VmcellError, match=f"asks for {name} ") as caught:
        checkpoint(shim, runc_options(**values), RUNC_OPTIONS, path=made(shim, "image"))
    assert caught.value.code == "unimplemented"
    assert shim.state().status == task.TaskStatus_RUNNING


BAD_OPTIONS: list[tuple[str, bytes, str]] = [
    (OWN_OPTIONS, b"", "are no io.vmcell.v1"),
    (OWN_OPTIONS, b"[]", "are no io.vmcell.v1"),
    (OWN_OPTIONS, b"{", "are no io.vmcell.v1"),
    (OWN_OPTIONS, b"\xff", "are no io.vmcell.v1"),
    (OWN_OPTIONS, b"[" * 100_000, "are no io.vmcell.v1"),
    (OWN_OPTIONS, b'{"snapshot": "s1"}', "are no io.vmcell.v1.*snapshot"),
    (OWN_OPTIONS, b'{"snapshot_id": 1}', "are no io.vmcell.v1"),
    (OWN_OPTIONS, b'{"snapshot_id": "s1", "drop_caches": 1}', "are no io.vmcell.v1"),
    (OWN_OPTIONS, b'{"snapshot_id": "../s1"}', "is no snapshot's id"),
    (OWN_OPTIONS, b'{"snapshot_id": "s1", "then": "exit"}', "takes run or pause"),
    (OWN_OPTIONS, b'{"snapshot_id": "s1", "then": []}', "takes run or pause"),
    (RUNC_OPTIONS, b"\xff", "inside a varint"),
    ("runc.CheckpointOptions", b"", "it takes io.vmcell.v1.CheckpointOptions as JSON or"),
    ("x" * 5000, b"", "it takes io.vmcell.v1.CheckpointOptions as JSON or"),
]


@pytest.mark.parametrize("row", BAD_OPTIONS, ids=range(len(BAD_OPTIONS)))
def test_bad_options(shim: Shim, row: tuple[str, bytes, str]) -> None:
    kind, value, word = row
    start(shim)
    with pytest.raises(VmcellError, match=word) as caught:
        checkpoint(shim, value, kind, path=shim.directory)
    assert caught.value.code == "invalid_argument"
    assert shim.state().status == task.TaskStatus_RUNNING
    assert snapshots(shim) == []
