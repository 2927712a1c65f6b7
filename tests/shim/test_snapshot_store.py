"""Snapshots of a host: whole or not there, and exactly what was saved when they are opened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim import snapshot_store
from vmcell_shim.digests import Digests
from vmcell_shim.living import identify
from vmcell_shim.snapshot_manifest import DISK, MEMORY, STATE, Manifest
from vmcell_shim.snapshot_store import (
    SnapshotDraft,
    open_snapshot,
    remove_snapshot,
    sweep,
)

CONTENT = {STATE: b"the state", MEMORY: b"the memory".ljust(1 << 20, b"\0"), DISK: b"the disk"}
ROOT = Path(__file__).resolve().parents[2]


class Store:
    """A directory of snapshots in which the test makes them step by step."""

    def __init__(self, directory: Path) -> None:
        self.root = str(directory / "snapshots")
        self.digests = Digests(str(directory / "digests"))

    def draft(self, snapshot_id: str = "s1") -> SnapshotDraft:
        return SnapshotDraft(self.root, snapshot_id)

    def write(self, draft: SnapshotDraft, *, disk: bool = True, salt: bytes = b"") -> Manifest:
        names = [STATE, MEMORY, *([DISK] if disk else [])]
        for name in names:
            fd = draft.create(name)
            os.write(fd, (salt + CONTENT[name])[: len(CONTENT[name])])
            os.close(fd)
        return Manifest(
            created_unix_ns=1,
            container_id="c1",
            vcpus=1,
            memory_mib=1,
            kernel="k",
            base_image="b",
            images=("i",),
            disk=disk,
            macs=(),
            terminal=False,
            parent="",
            files=draft.saved_files(names, self.digests),
        )

    def make(self, snapshot_id: str = "s1", *, disk: bool = True, salt: bytes = b"") -> Path:
        draft = self.draft(snapshot_id)
        draft.seal(self.write(draft, disk=disk, salt=salt))
        draft.commit()
        return Path(self.root, snapshot_id)

    def read(self, snapshot_id: str = "s1") -> dict[str, bytes]:
        snapshot = open_snapshot(self.root, snapshot_id, self.digests)
        fds = {STATE: snapshot.state_fd, MEMORY: snapshot.memory_fd, DISK: snapshot.disk_fd}
        try:
            return {name: os.pread(fd, 2 << 20, 0) for name, fd in fds.items() if fd >= 0}
        finally:
            snapshot.close()

    def names(self) -> list[str]:
        return sorted(os.listdir(self.root))

    def refused(self, code: str, word: str, snapshot_id: str = "s1") -> None:
        before = open_descriptors()
        with pytest.raises(CallerError, match=word) as caught:
            self.read(snapshot_id)
        assert caught.value.code == code
        assert open_descriptors() == before


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def snapshots(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize("disk", [True, False])
def test_made_and_opened(snapshots: Store, disk: bool) -> None:
    path = snapshots.make(disk=disk)
    wanted = {name: data for name, data in CONTENT.items() if disk or name != DISK}
    before = open_descriptors()
    assert snapshots.read() == wanted
    assert open_descriptors() == before
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.iterdir()}
    assert set(modes) == {"manifest.json", *wanted}
    assert set(modes.values()) == {0o400}
    assert path.stat().st_mode & 0o777 == 0o700
    assert snapshots.names() == ["s1"]


def test_nothing_is_there_before_the_commit(snapshots: Store) -> None:
    draft = snapshots.draft()
    manifest = snapshots.write(draft)
    snapshots.refused("not_found", "s1 does not exist on this host")
    draft.seal(manifest)
    snapshots.refused("not_found", "s1 does not exist on this host")
    draft.commit()
    assert snapshots.read() == CONTENT


def test_discarded(snapshots: Store) -> None:
    draft = snapshots.draft()
    snapshots.write(draft)
    draft.discard()
    draft.discard()
    assert snapshots.names() == []
    snapshots.make()
    committed = snapshots.draft("s2")
    committed.seal(snapshots.write(committed))
    committed.commit()
    committed.discard()
    assert snapshots.names() == ["s1", "s2"]


def test_a_commit_that_is_not_on_the_disk_is_none(
    snapshots: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> None:
        raise OSError(5, "Input/output error")

    draft = snapshots.draft()
    draft.seal(snapshots.write(draft))
    monkeypatch.setattr(snapshot_store, "_sync_directory", broken)
    with pytest.raises(OSError, match="Input/output error"):
        draft.commit()
    assert "s1" not in snapshots.names()
    draft.discard()
    assert snapshots.names() == []


def test_an_id_that_is_taken(snapshots: Store) -> None:
    snapshots.make()
    with pytest.raises(CallerError, match="s1 exists already") as caught:
        snapshots.draft()
    assert caught.value.code == "already_exists"
    assert snapshots.names() == ["s1"]


def test_an_id_that_is_taken_meanwhile(snapshots: Store) -> None:
    first, second = snapshots.draft(), snapshots.draft()
    for draft in (first, second):
        draft.seal(snapshots.write(draft, salt=b"" if draft is first else b"x"))
    first.commit()
    with pytest.raises(CallerError, match="s1 exists already") as caught:
        second.commit()
    assert caught.value.code == "already_exists"
    second.discard()
    assert snapshots.read() == CONTENT
    assert snapshots.names() == ["s1"]


def test_many_commits_of_one_id(snapshots: Store) -> None:
    """One of them is there, whole; the others say so."""
    drafts = [snapshots.draft() for _ in range(8)]
    for number, draft in enumerate(drafts):
        draft.seal(snapshots.write(draft, salt=bytes([number])))
    refusals: list[str] = []

    def commit(draft: SnapshotDraft) -> None:
        try:
            draft.commit()
        except CallerError as error:
            refusals.append(error.code)
        finally:
            draft.discard()

    threads = [threading.Thread(target=commit, args=(draft,)) for draft in drafts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refusals == ["already_exists"] * 7
    assert snapshots.names() == ["s1"]
    assert len(snapshots.read()) == 3


@pytest.mark.parametrize("snapshot_id", ["", "..", "../x", "A", ".s1", "a/b"])
def test_what_is_no_id(snapshots: Store, snapshot_id: str) -> None:
    for act in (
        lambda: snapshots.draft(snapshot_id),
        lambda: open_snapshot(snapshots.root, snapshot_id, snapshots.digests),
        lambda: remove_snapshot(snapshots.root, snapshot_id),
    ):
        with pytest.raises(CallerError, match="is no snapshot's id"):
            act()


def test_removed_while_it_is_open(snapshots: Store) -> None:
    snapshots.make()
    opened = open_snapshot(snapshots.root, "s1", snapshots.digests)
    remove_snapshot(snapshots.root, "s1")
    remove_snapshot(snapshots.root, "s1")
    assert snapshots.names() == []
    assert os.pread(opened.memory_fd, 10, 0) == CONTENT[MEMORY][:10]
    opened.close()
    snapshots.refused("not_found", "does not exist")
    snapshots.make()
    assert snapshots.read() == CONTENT


def test_replaced_after_it_was_opened(snapshots: Store) -> None:
    path = snapshots.make()
    opened = open_snapshot(snapshots.root, "s1", snapshots.digests)
    other = path / "other"
    other.write_bytes(b"another memory")
    other.rename(path / MEMORY)
    assert os.pread(opened.memory_fd, 10, 0) == CONTENT[MEMORY][:10]
    opened.close()
    snapshots.refused("data_loss", "memory of snapshot s1 is damaged: it has 14 bytes and had")


def remove(path: Path) -> None:
    path.unlink()


def link_to_itself(path: Path) -> None:
    """What it was, but by way of a link."""
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def fifo(path: Path) -> None:
    """Nobody writes to it: whoever opens it without care waits for ever."""
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


PLACES = [remove, link_to_itself, dangling_link, link_to_a_device, fifo, directory]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", STATE, MEMORY, DISK])
@pytest.mark.parametrize("put", PLACES)
def test_what_is_no_file(snapshots: Store, put: Callable[[Path], None], name: str) -> None:
    put(snapshots.make() / name)
    snapshots.refused("data_loss", f"^{name} of snapshot s1 is damaged: .*; delete the snapshot$")


def test_a_snapshot_that_is_a_file(snapshots: Store) -> None:
    snapshots.make("s2")
    Path(snapshots.root, "s1").write_bytes(b"")
    snapshots.refused("not_found", "does not exist")
    with pytest.raises(CallerError, match="exists already"):
        snapshots.draft()


@pytest.mark.parametrize("name", [STATE, MEMORY, DISK])
def test_content_that_changed_after_a_first_look(snapshots: Store, name: str) -> None:
    """The digest that is remembered is of what was there."""
    path = snapshots.make() / name
    assert snapshots.read() == CONTENT
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"T")
    snapshots.refused("data_loss", f"^{name} of snapshot s1 is damaged: its content is not what")


def test_a_directory_that_cannot_be_made(snapshots: Store, tmp_path: Path) -> None:
    (tmp_path / "snapshots").write_bytes(b"")
    with pytest.raises(HostError, match="cannot make "):
        snapshots.draft()


# ---- whoever makes one is killed ---------------------------------------------------------------

PROGRAM = """
import os, signal, sys
sys.path[:0] = {roots!r}
from pathlib import Path
from tests.shim import test_snapshot_store as here
store = here.Store(Path({directory!r}))
here.die_at({step!r}, store)
"""
STEPS = (
    "draft made",
    "state written",
    "memory written",
    "disk written",
    "half a manifest",
    "manifest written",
    "sealed",
    "renamed",
    "synced",
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: str, store: Store) -> None:
    """In a process of its own: makes a snapshot and is killed there."""
    draft = store.draft()
    if step == "draft made":
        die()
    written = {f"{name.removesuffix('.json')} written": name for name in CONTENT}
    if step in written:
        name = written[step]
        os.write(draft.create(name), CONTENT[name])
        die()
    manifest = store.write(draft)
    if step == "half a manifest":
        snapshot_store.write_all = lambda fd, data: (os.write(fd, data[:100]), die())
    if step == "manifest written":
        snapshot_store.os.fsync = lambda fd: die()
    draft.seal(manifest)
    if step == "sealed":
        die()
    if step == "renamed":
        snapshot_store._sync_directory = lambda path: die()
    draft.commit()
    die()


@pytest.mark.parametrize("step", STEPS)
def test_killed(snapshots: Store, tmp_path: Path, step: str) -> None:
    """Nothing is visible, or all of it; what is left goes when the next one is made."""
    roots = [str(ROOT), *(str(ROOT / name) for name in ("protos", "runtime", "shim"))]
    text = PROGRAM.format(roots=roots, directory=str(tmp_path), step=step)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    if step in ("renamed", "synced"):
        assert snapshots.names() == ["s1"]
        assert snapshots.read() == CONTENT
        return
    assert [name for name in snapshots.names() if not name.startswith(".")] == []
    assert len(snapshots.names()) == 1
    snapshots.refused("not_found", "does not exist")
    snapshots.make("s2")
    assert snapshots.names() == ["s2"]


def test_a_removal_that_was_killed_is_finished(
    snapshots: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.make()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot_store.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_snapshot(snapshots.root, "s1")
    monkeypatch.undo()
    (name,) = snapshots.names()
    # As if another process had begun it, which is gone.
    maker = identify(os.getpid())
    dead = name.replace(f"-{maker.start_ticks}.", f"-{maker.start_ticks + 1}.")
    os.rename(Path(snapshots.root, name), Path(snapshots.root, dead))
    sweep(snapshots.root)
    assert snapshots.names() == []


def test_the_sweep_leaves_what_lives_and_what_it_does_not_know(snapshots: Store) -> None:
    draft = snapshots.draft()
    snapshots.make("s2")
    strange = Path(snapshots.root, ".strange")
    strange.mkdir()
    Path(snapshots.root, ".x.1-2.3").symlink_to(strange)
    sweep(snapshots.root)
    kept = [".strange", ".x.1-2.3", os.path.basename(draft.directory), "s2"]
    assert snapshots.names() == sorted(kept)
    assert strange.is_dir()


# ---- no room ----------------------------------------------------------------------------------


def test_a_manifest_that_is_written_in_pieces(
    snapshots: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    draft = snapshots.draft()
    manifest = snapshots.write(draft)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:50]))
    draft.seal(manifest)
    draft.commit()
    assert snapshots.read() == CONTENT


def test_a_manifest_for_which_there_is_no_room(
    snapshots: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = snapshots.draft()
    manifest = snapshots.write(draft)
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(draft, "create", lambda name: full)
    with pytest.raises(OSError, match="No space left"):
        draft.seal(manifest)
    draft.discard()
    assert snapshots.names() == []


def test_a_manifest_that_says_more_than_is_there(snapshots: Store) -> None:
    draft = snapshots.draft()
    manifest = snapshots.write(draft)
    draft.seal(replace(manifest, memory_mib=2, files={**manifest.files}))
    draft.commit()
    snapshots.refused("data_loss", "its memory has not the length it says")
