"""The mounts of every snapshotter, and the images and disks a guest gets for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from layer_trees import layer_dirs, layer_images, overlay, read_image

from vmcell_protos.errors import CallerError
from vmcell_protos.task import Mount
from vmcell_shim.erofs import ALIGN_BYTES
from vmcell_shim.rootfs import (
    BLOCK_FILE_SYSTEMS,
    RootImages,
    RootSource,
    parse_mounts,
    prepare_root,
)
from vmcell_shim.saved_container import SavedRoot

GUEST_KERNEL = Path(__file__).resolve().parents[2] / "kernel/x86_64.config"


class SavedDisk(SavedRoot):
    """That of a snapshot whose images fit and whose disk is the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def disk_for(self, lowers: tuple[str, ...], *, writable: bool) -> str:
        return str(self._path)


def prepare(
    source: RootSource, directory: Path, *, max_lowers: int = 7, saved: SavedRoot | None = None
) -> RootImages:
    return prepare_root(
        source,
        cache_dir=str(directory / "cache"),
        own_dir=str(directory / "own"),
        writable_mib=64,
        cache_limit_mib=1024,
        max_lowers=max_lowers,
        saved=saved,
    )


def test_overlay_snapshot(tmp_path: Path) -> None:
    lower = layer_dirs(tmp_path)
    upper = tmp_path / "snapshots/3/fs"
    upper.mkdir(parents=True)
    source = parse_mounts([overlay(lower, str(upper))], "rootfs", False)
    assert (source.layers, source.private, source.read_only) == (tuple(lower), False, False)
    assert source.snapshot_dir == str(upper.parent)
    (upper / "written-before").touch()
    source = parse_mounts([overlay(lower, str(upper))], "rootfs", True)
    assert (source.layers[0], source.private, source.read_only) == (str(upper), True, True)


def test_view_is_read_only(tmp_path: Path) -> None:
    lower = layer_dirs(tmp_path)
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
        (
            [Mount(type="xfs", source="/dev/mapper/x", options=["nouuid"])],
            "",
            "'xfs'.*fs_type ext4",
        ),
        ([Mount(type="btrfs", source="/dev/sda")], "", "btrfs"),
        ([Mount(type="ext4", source="/dev/mapper/absent")], "", "/dev/mapper/absent"),
        ([Mount(type="ext4", source="/dev/null")], "", "neither a block device nor a file"),
        ([Mount(type="ext4", source="/x", options=["ro"])], "", "'ro'"),
        ([Mount(type="erofs", source="/a"), Mount(type="overlay")], "", "overlay"),
        ([Mount(type="erofs", source="/no/layer.erofs")], "", "/no/layer.erofs"),
        ([Mount(type="overlay", options=["upperdir=/x"])], "", "without lowerdir"),
        ([Mount(type="overlay", options=["lowerdir=relative"])], "", "relative"),
        ([Mount(type="overlay", options=["lowerdir=/", "uidmap=0:1:9"])], "", "uidmap"),
        ([Mount(type="bind", source="/no/such/dir")], "", "/no/such/dir"),
        ([], "rootfs", "rootfs"),
        ([], "", "absolute path"),
    ],
)
def test_other_roots_are_refused_by_name(mounts: list[Mount], root: str, named: str) -> None:
    with pytest.raises(CallerError, match=named):
        parse_mounts(mounts, root, False)


def test_file_systems_of_disks_are_those_of_the_guests_kernel() -> None:
    config = GUEST_KERNEL.read_text().splitlines()
    for name in BLOCK_FILE_SYSTEMS:
        assert f"CONFIG_{name.upper()}_FS=y" in config
    if "CONFIG_XFS_FS=y" in config:
        assert "xfs" in BLOCK_FILE_SYSTEMS, "the guest can now; so can devmapper's default"


def test_a_disk_is_given_as_it_is(tmp_path: Path) -> None:
    """The blockfile snapshotter's file. Nothing is made, also for a read-only root."""
    (tmp_path / "1").write_bytes(b"ext4")
    mount = Mount(type="ext4", source=str(tmp_path / "1"), options=["loop", "rw"])
    for read_only in (False, True):
        source = parse_mounts([mount], "", read_only)
        images = prepare(source, tmp_path)
        assert images == RootImages(block_device=str(tmp_path / "1"), keeps_writes=True)
        with pytest.raises(CallerError, match="0 images"):
            _ = images.image
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.root
def test_a_block_device_behind_a_link(tmp_path: Path) -> None:
    """As /dev/mapper has them."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    words = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    device = subprocess.check_output(words, text=True).strip()
    try:
        (tmp_path / "pool-snap-1").symlink_to(device)
        mount = Mount(type="ext4", source=str(tmp_path / "pool-snap-1"))
        assert parse_mounts([mount], "", False).block_device == mount.source
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_image_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/motd").write_text("hello")
    images = prepare(parse_mounts([], str(tmp_path / "tree"), False), tmp_path)
    assert os.path.dirname(images.image) == os.path.dirname(images.disk) == str(tmp_path / "own")
    assert not images.keeps_writes
    assert os.path.getsize(images.image) % ALIGN_BYTES == 0
    assert Path(images.image).read_bytes()[1024:1028] == b"\xe2\xe1\xf5\xe0"


def image_list(images: list[str], upper: str = "") -> list[Mount]:
    mounts = [Mount(type="erofs", source=path, options=["ro", "loop"]) for path in images]
    names = "{{ mount 0 }}" if len(images) == 1 else f"{{{{ overlay 0 {len(images) - 1} }}}}"
    options = [f"lowerdir={names}"]
    if upper:
        options += [f"upperdir={upper}", f"workdir={upper}/../work"]
    return [*mounts, Mount(type="format/mkdir/overlay", source="overlay", options=options)]


def test_layers_go_to_the_guest_as_they_are(tmp_path: Path) -> None:
    layers = layer_images(tmp_path, 3)
    upper = tmp_path / "snapshots/4/fs"
    upper.mkdir(parents=True)
    before = [os.stat(path) for path in layers]
    images = prepare(parse_mounts(image_list(layers, str(upper)), "", False), tmp_path)
    assert images.lowers == tuple(layers)
    assert images.disk == str(upper.parent / "vmcell.ext4")
    assert (images.keeps_writes, images.cached) == (True, None)
    assert [os.stat(path)[:7] for path in layers] == [status[:7] for status in before]
    assert not (tmp_path / "own").exists()
    assert not (tmp_path / "cache/erofs").exists()
    with pytest.raises(CallerError, match="3 images"):
        _ = images.image
    read_only = prepare(parse_mounts(image_list(layers), "", False), tmp_path)
    assert (read_only.lowers, read_only.disk) == (tuple(layers), "")


def test_the_file_for_writes_of_a_quota(tmp_path: Path) -> None:
    """Made by us where containerd leaves that to us, used as it is where it does not."""
    layers = layer_images(tmp_path, 1)
    (tmp_path / "snapshots/2").mkdir()
    disk = tmp_path / "snapshots/2/rwlayer.img"
    made = ["X-containerd.mkfs.fs=ext4", f"X-containerd.mkfs.size={65 << 20}", "rw", "loop"]
    layer = Mount(type="erofs", source=layers[0], options=["ro", "loop"])
    options = ["lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/upper"]
    joined = Mount(type="format/mkdir/overlay", source="overlay", options=options)
    ready = [Mount(type="ext4", source=str(disk), options=["rw"]), layer, joined]
    with pytest.raises(CallerError, match=r"rwlayer\.img"):
        prepare(parse_mounts(ready, "", False), tmp_path)
    ours = [Mount(type="mkfs/ext4", source=str(disk), options=made), layer, joined]
    for mounts in (ours, ready):
        images = prepare(parse_mounts(mounts, "", False), tmp_path)
        assert (images.lowers, images.disk, images.keeps_writes) == (tuple(layers), str(disk), True)
        assert disk.stat().st_size == 65 << 20
    assert prepare(parse_mounts(ours, "", True), tmp_path).disk == ""


@pytest.mark.root
def test_the_same_layers_make_one_image(store: Path, tmp_path: Path) -> None:
    lower = layer_dirs(store)
    for number in (3, 4):
        upper = store / f"snapshots/{number}/fs"
        upper.mkdir(parents=True)
        images = prepare(parse_mounts([overlay(lower, str(upper))], "", False), store)
        assert images.lowers == (images.image,)
        assert images.cached is not None
        assert read_image(images.image, tmp_path) == {"file1": "layer 1", "file2": "layer 2"}
        images.close()
        images.close()
    assert len(list((store / "cache/erofs").glob("*.erofs"))) == 1


@pytest.mark.root
def test_what_stands_in_the_snapshot_belongs_to_the_root(store: Path, tmp_path: Path) -> None:
    upper = store / "snapshots/9/fs"
    upper.mkdir(parents=True)
    (upper / "file1").write_text("written before")
    for layers in (layer_dirs(store / "a"), layer_images(store / "b")):
        mounts = [overlay(layers, str(upper))] if "a/" in layers[0] else image_list(layers)
        if len(mounts) > 1:
            mounts[-1].options.append(f"upperdir={upper}")
        images = prepare(parse_mounts(mounts, "", False), store)
        assert images.image == str(store / "own/root.erofs")
        assert read_image(images.image, tmp_path) == {
            "file1": "written before",
            "file2": "layer 2",
        }


@pytest.mark.root
def test_too_many_or_compressed_layers_become_one_image(store: Path, tmp_path: Path) -> None:
    many = layer_images(store / "many", 4)
    squeezed = layer_images(store / "squeezed", 1, "-zlz4hc")
    assert prepare(parse_mounts(image_list(many), "", False), store, max_lowers=4).cached is None
    for layers in (many, squeezed):
        images = prepare(parse_mounts(image_list(layers), "", False), store, max_lowers=3)
        assert images.cached is not None
        assert len(read_image(images.image, tmp_path)) == len(layers)
        images.close()


@pytest.mark.root
def test_layers_that_containerd_has_mounted(store: Path, tmp_path: Path) -> None:
    """containerd 2.1, and 2.2 for a shim that claims nothing: directories, new ones each time."""
    layers = layer_images(tmp_path, 2)
    for number in (1, 2):
        places = []
        for index, layer in enumerate(layers):
            place = store / f"t/{number}/{index}"
            place.mkdir(parents=True)
            subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", layer, place], check=True)
            places.append(str(place))
        images = prepare(parse_mounts([overlay(places)], "", False), store)
        assert images.lowers == tuple(layers)


def test_a_snapshot_does_not_say_how_much_of_the_disk_may_be_filled(tmp_path: Path) -> None:
    root, saved = tmp_path / "root", tmp_path / "saved"
    root.mkdir()
    saved.write_bytes(b"what was written")
    source = parse_mounts([], str(root), False)
    os.truncate(saved, 64 << 20)
    images = prepare(source, tmp_path, saved=SavedDisk(saved))
    assert Path(images.disk).read_bytes() == saved.read_bytes()
    Path(images.disk).unlink()
    os.truncate(saved, (64 << 20) + 4096)
    with pytest.raises(CallerError, match="make writable_mib larger") as caught:
        prepare(source, tmp_path, saved=SavedDisk(saved))
    assert caught.value.code == "failed_precondition"
    assert not Path(images.disk).exists()
