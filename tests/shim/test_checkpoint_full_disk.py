"""No room for a snapshot, at each step of making one: an error says so, and nothing is left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_harness import Shim
from snapshot_calls import checkpoint, end, handle, made, opened, pause, restore, save, start

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_shim.snapshot_store import remove_snapshot

pytestmark = pytest.mark.root

PAGE = 4096


@pytest.fixture
def full(shim: Shim) -> Iterator[Path]:
    """The directory of snapshots, 4 MiB large."""
    path = shim.directory / "snapshots"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def free_pages(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize // PAGE


class Filler:
    """A file that leaves so many pages free. What a guest's memory was last saved to it keeps, also
    when the file has no name any more."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / ".filler"

    def leave(self, pages: int) -> None:
        self._path.unlink(missing_ok=True)
        self._path.write_bytes(b"\1" * PAGE * (free_pages(self._directory) - pages))
        assert free_pages(self._directory) == pages

    def remove(self) -> None:
        self._path.unlink()


def pages_of(act: object, path: Path) -> int:
    before = free_pages(path)
    assert callable(act)
    act()
    return before - free_pages(path)


@pytest.mark.parametrize("paused", [False, True])
def test_a_snapshot(shim: Shim, full: Path, paused: bool) -> None:
    start(shim)
    if paused:
        pause(shim)
        wanted, options = task.TaskStatus_PAUSED, {"then": "pause"}
    else:
        wanted, options = task.TaskStatus_RUNNING, {}
    needed = pages_of(lambda: save(shim, "first", **options), full)
    assert needed > 10
    filler = Filler(full)
    # Nothing at all, the first files, much of the disk.
    for pages in (0, 1, 2, 3, 5, 20, needed // 2):
        filler.leave(pages)
        with pytest.raises(VmcellError, match="No space left") as caught:
            save(shim, "s1", **options)
        assert caught.value.code == "resource_exhausted"
        assert sorted(os.listdir(full)) == [".filler", "first"]
        assert shim.state().status == wanted
        assert handle(shim).stands_still == paused
    # The last ones, for which what the guest's memory was saved to before may make room.
    outcomes = [
        just_fits(shim, full, filler, pages, options) for pages in range(needed - 6, needed)
    ]
    assert not all(outcomes)
    assert shim.state().status == wanted
    filler.leave(needed)
    save(shim, "s1", **options)
    filler.remove()
    with opened("s1"), opened("first"):
        pass
    end(shim)


def just_fits(shim: Shim, full: Path, filler: Filler, pages: int, options: dict[str, str]) -> bool:
    """Whether it does; there is a whole snapshot then, which is removed, else none."""
    filler.leave(pages)
    try:
        save(shim, "s1", **options)
    except VmcellError:
        assert sorted(os.listdir(full)) == [".filler", "first"]
        return False
    with opened("s1"):
        remove_snapshot(str(full), "s1")
    return True


def test_a_checkpoint_image(shim: Shim, full: Path) -> None:
    """No room for what is exported: the directory is as empty as it was."""
    start(shim)
    needed = pages_of(lambda: save(shim, "first"), full)
    target = full / "image"
    target.mkdir()
    filler = Filler(full)
    for pages in (0, 3, needed - 1, needed + 1, needed + needed // 2):
        filler.leave(pages)
        with pytest.raises(VmcellError, match="No space left") as caught:
            checkpoint(shim, path=target)
        assert caught.value.code == "resource_exhausted"
        assert os.listdir(target) == []
        assert shim.state().status == task.TaskStatus_RUNNING
    end(shim)


def test_the_import_of_one(shim: Shim, other: Shim, full: Path) -> None:
    start(shim)
    image = made(shim, "image")
    checkpoint(shim, path=image)
    end(shim)
    filler = Filler(full)
    for pages in (0, 1, 3, 50):
        filler.leave(pages)
        with pytest.raises(VmcellError, match="No space left") as caught:
            restore(other, shim, "", checkpoint=image)
        assert caught.value.code == "resource_exhausted"
        assert os.listdir(full) == [".filler"]
        assert shim.left_behind() == []
    filler.remove()
    restore(other, shim, "", checkpoint=image)
    other.start(container_id="c2")
    end(other, "c2")
