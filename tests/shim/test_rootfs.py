"""Mounts of snapshotters, EROFS images of layers, the writable disk."""

from __future__ import annotations

import filecmp
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_protos.task import Mount
from vmcell_shim.disk import writable_disk
from vmcell_shim.erofs import ALIGN_BYTES, chain_image, tree_image
from vmcell_shim.rootfs import parse_mounts, prepare_root


def layers(tmp_path: Path, count: int = 2) -> list[str]:
    """Layer directories as the overlayfs snapshotter names them, topmost first."""
    paths = []
    for number in range(count, 0, -1):
        path = tmp_path / f"snapshots/{number}/fs"
        path.mkdir(parents=True)
        (path / f"file{number}").write_text(f"layer {number}")
        paths.append(str(path))
    return paths


def overlay(lower: list[str], upper: str = "") -> Mount:
    options = ["index=off", f"lowerdir={':'.join(lower)}"]
    if upper:
        options += [f"upperdir={upper}", f"workdir={upper}/../work"]
    return Mount(type="overlay", source="overlay", options=options)


def test_overlay_snapshot(tmp_path: Path) -> None:
    lower = layers(tmp_path)
    upper = tmp_path / "snapshots/3/fs"
    upper.mkdir(parents=True)
    source = parse_mounts([overlay(lower, str(upper))], "rootfs", False)
    assert (source.layers, source.private, source.read_only) == (tuple(lower), False, False)
    assert source.snapshot_dir == str(upper.parent)
    (upper / "written-before").touch()
    source = parse_mounts([overlay(lower, str(upper))], "rootfs", True)
    assert (source.layers[0], source.private, source.read_only) == (str(upper), True, True)


def test_view_is_read_only(tmp_path: Path) -> None:
    lower = layers(tmp_path)
    assert parse_mounts([overlay(lower)], "", False).read_only
    bind = Mount(type="bind", source=lower[0], options=["rbind", "ro"])
    source = parse_mounts([bind], "", False)
    assert (source.directory, source.read_only) == (lower[0], True)


def test_plain_directories(tmp_path: Path) -> None:
    bind = Mount(type="bind", source=str(tmp_path), options=["rbind", "rw"])
    for source in (parse_mounts([bind], "", False), parse_mounts([], str(tmp_path), False)):
        assert (source.layers, source.directory) == ((), str(tmp_path))
        assert not source.read_only


@pytest.mark.parametrize(
    ("mounts", "root", "named"),
    [
        ([Mount(type="ext4", source="/dev/mapper/x")], "", "ext4"),
        ([Mount(type="erofs", source="/a"), Mount(type="overlay")], "", "erofs, overlay"),
        ([Mount(type="overlay", options=["upperdir=/x"])], "", "without lowerdir"),
        ([Mount(type="overlay", options=["lowerdir=relative"])], "", "relative"),
        ([Mount(type="bind", source="/no/such/dir")], "", "/no/such/dir"),
        ([], "rootfs", "rootfs"),
        ([], "", "absolute path"),
    ],
)
def test_other_roots_are_refused_by_name(mounts: list[Mount], root: str, named: str) -> None:
    with pytest.raises(CallerError, match=named):
        parse_mounts(mounts, root, False)


def test_disk_is_a_sparse_copy_that_is_kept(tmp_path: Path) -> None:
    disk = tmp_path / "snapshot/vmcell.ext4"
    disk.parent.mkdir()
    writable_disk(str(disk), 1024, str(tmp_path / "cache"))
    status = disk.stat()
    assert status.st_size == 1024 << 20
    assert status.st_blocks * 512 < 8 << 20
    checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
    with disk.open("r+b") as file:
        file.write(b"kept")
    writable_disk(str(disk), 1024, str(tmp_path / "cache"))
    with disk.open("rb") as file:
        assert file.read(4) == b"kept"
    assert [path.name for path in disk.parent.iterdir()] == ["vmcell.ext4"]


def test_short_writes_are_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is nearly full takes a part first; the error comes with the next write."""
    writable_disk(str(tmp_path / "whole"), 64, str(tmp_path / "cache"))
    whole_pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole_pwrite(fd, data[:5000], at))
    monkeypatch.setattr("vmcell_shim.disk._clone", lambda *_: False)
    writable_disk(str(tmp_path / "parts"), 64, str(tmp_path / "cache"))
    assert filecmp.cmp(tmp_path / "whole", tmp_path / "parts", shallow=False)


def test_impossible_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"mkfs\.ext4"):
        writable_disk(str(tmp_path / "disk"), 16, str(tmp_path / "cache"))
    assert list((tmp_path / "cache/ext4").iterdir()) == []
    assert not (tmp_path / "disk").exists()


def test_image_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/motd").write_text("hello")
    source = parse_mounts([], str(tmp_path / "tree"), False)
    images = prepare_root(
        source, cache_dir=str(tmp_path / "cache"), own_dir=str(tmp_path / "own"), writable_mib=64
    )
    (image,) = images.lowers
    assert os.path.dirname(image) == os.path.dirname(images.disk) == str(tmp_path / "own")
    assert os.path.getsize(image) % ALIGN_BYTES == 0
    assert Path(image).read_bytes()[1024:1028] == b"\xe2\xe1\xf5\xe0"


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="absent"):
        tree_image(str(tmp_path / "absent"), str(tmp_path / "image"))
    with pytest.raises(HostError, match="absent"):
        chain_image([str(tmp_path / "absent")], str(tmp_path / "cache"))
    assert not (tmp_path / "image").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is full after 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, because layers below an overlay must not be on one themselves."""
    path = tmp_path / "store"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def read_image(image: str, tmp_path: Path) -> dict[str, str]:
    """Every file of the image with its content."""
    target = tmp_path / "mounted"
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", image, target], check=True)
    try:
        return {
            str(path.relative_to(target)): path.read_text() if path.is_file() else ""
            for path in sorted(target.rglob("*"))
        }
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.root
def test_layers_are_merged(store: Path, tmp_path: Path) -> None:
    """Replaced, deleted and opaque entries, as overlayfs means them (overlayfs.rst)."""
    top, middle, bottom = layers(store, 3)
    for layer in (middle, bottom):
        for name in ("replaced", "deleted", "opaque/hidden"):
            (Path(layer) / name).parent.mkdir(exist_ok=True)
            (Path(layer) / name).write_text("from below")
    (Path(top) / "replaced").write_text("from above")
    os.mknod(f"{top}/deleted", 0o20600, os.makedev(0, 0))
    (Path(top) / "opaque").mkdir()
    os.setxattr(f"{top}/opaque", "trusted.overlay.opaque", b"y")
    (Path(top) / "opaque/new").write_text("from above")
    image = chain_image([top, middle, bottom], str(store / "cache"))
    assert read_image(image, tmp_path) == {
        "file1": "layer 1",
        "file2": "layer 2",
        "file3": "layer 3",
        "opaque": "",
        "opaque/new": "from above",
        "replaced": "from above",
    }
    names = {path.suffix for path in (store / "cache/erofs").iterdir()}
    assert names == {".erofs", ".json", ""}
    assert str(store / "cache/erofs") not in Path("/proc/self/mounts").read_text()


@pytest.mark.root
def test_whiteouts_of_a_single_layer_vanish(store: Path, tmp_path: Path) -> None:
    (only,) = layers(store, 1)
    os.mknod(f"{only}/deleted", 0o20600, os.makedev(0, 0))
    image = chain_image([only], str(store / "cache"))
    assert read_image(image, tmp_path) == {"file1": "layer 1"}


@pytest.mark.root
def test_times_owners_and_links_are_kept(store: Path, tmp_path: Path) -> None:
    (only,) = layers(store, 1)
    path = Path(only) / "file1"
    os.chown(path, 1234, 5678)
    path.chmod(0o4755)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    (Path(only) / "link").symlink_to("file1")
    image = chain_image([only], str(store / "cache"))
    target = tmp_path / "mounted"
    target.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", image, target], check=True)
    try:
        status = (target / "file1").stat()
        link = (target / "link").readlink()
    finally:
        subprocess.run(["umount", target], check=True)
    assert (status.st_uid, status.st_gid) == (1234, 5678)
    assert (status.st_mode & 0o7777, status.st_mtime) == (0o4755, 1_600_000_000)
    assert str(link) == "file1"


@pytest.mark.root
def test_one_chain_is_built_once(store: Path) -> None:
    chain = layers(store)
    made: list[tuple[str, int]] = []

    def build() -> None:
        path = chain_image(chain, str(store / "cache"))
        made.append((path, os.stat(path).st_ino))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 4
    assert len(set(made)) == 1


@pytest.mark.root
def test_image_of_a_removed_chain_is_collected(store: Path) -> None:
    old = layers(store / "old")
    old_image = chain_image(old, str(store / "cache"))
    subprocess.run(["rm", "-r", str(store / "old")], check=True)
    (store / "cache/erofs/x.erofs.partial").write_text("left by a build that was killed")
    new_image = chain_image(layers(store / "new"), str(store / "cache"))
    assert not os.path.exists(old_image)
    names = sorted(path.name for path in (store / "cache/erofs").iterdir())
    base = os.path.basename(new_image)
    assert names == sorted([base, f"{base}.json", "lock"])


@pytest.mark.root
@pytest.mark.parametrize("text", ["", "[", '["/no/such/layer"]'])
def test_damaged_list_of_sources_is_removed_with_its_image(store: Path, text: str) -> None:
    cache = store / "cache/erofs"
    cache.mkdir(parents=True)
    (cache / "x.erofs").write_text("of an image whose layers nobody knows")
    (cache / "x.erofs.json").write_text(text)
    image = chain_image(layers(store), str(store / "cache"))
    base = os.path.basename(image)
    assert sorted(path.name for path in cache.iterdir()) == sorted([base, f"{base}.json", "lock"])


@pytest.mark.root
def test_full_disk_is_one_sentence_and_no_half_file(store: Path, small_disk: Path) -> None:
    chain = layers(store)
    (Path(chain[0]) / "big").write_bytes(os.urandom(8 << 20))
    with pytest.raises(HostError, match="MiB are free") as caught:
        chain_image(chain, str(small_disk))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (small_disk / "erofs").iterdir()] == ["lock"]


@pytest.mark.root
def test_full_disk_while_a_disk_is_copied(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(HostError, match="No space left"):
        writable_disk(str(small_disk / "vmcell.ext4"), 10240, str(tmp_path / "cache"))
    assert list(small_disk.iterdir()) == []
