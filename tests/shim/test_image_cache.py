"""EROFS images of merged layers: what is in them, who shares them, when they go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from layer_trees import layer_dirs, layer_images, read_image
from shim_harness import wait_until

from vmcell_protos.errors import HostError
from vmcell_shim.cache_collector import collect, list_images
from vmcell_shim.cached_image import CachedImage, record_path
from vmcell_shim.digests import Digests
from vmcell_shim.erofs import tree_image
from vmcell_shim.image_cache import chain_image
from vmcell_shim.layers import find_layers

ROOMY_MIB = 1024
ROOTS = [str(Path(__file__).resolve().parents[2] / name) for name in ("protos", "shim", "runtime")]


def build(paths: list[str], directory: Path, limit_mib: int = ROOMY_MIB) -> CachedImage:
    return chain_image(find_layers(paths), str(directory / "cache"), limit_mib=limit_mib)


def build_path(paths: list[str], directory: Path, limit_mib: int = ROOMY_MIB) -> str:
    """The same for an image that nobody uses."""
    held = build(paths, directory, limit_mib)
    held.close()
    return held.path


def names(directory: Path) -> list[str]:
    found = sorted(path.name for path in (directory / "cache/erofs").iterdir())
    return [name for name in found if name not in ("lock", "mnt")]


def whole(*images: str) -> list[str]:
    """The names that belong to these images."""
    bases = [os.path.basename(image) for image in images]
    return sorted([*bases, *(f"{base}.json" for base in bases)])


def states(directory: Path) -> dict[str, str]:
    return {row.path: row.state for row in list_images(str(directory / "cache"))}


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="absent"):
        tree_image(str(tmp_path / "absent"), str(tmp_path / "image"))
    assert not (tmp_path / "image").exists()


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list_images(str(tmp_path)) == []
    assert collect(str(tmp_path), limit_mib=1) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_layers_are_merged(store: Path, tmp_path: Path) -> None:
    """Replaced, deleted and opaque entries, as overlayfs means them (overlayfs.rst)."""
    top, middle, bottom = layer_dirs(store, 3)
    for layer in (middle, bottom):
        for name in ("replaced", "deleted", "opaque/hidden"):
            (Path(layer) / name).parent.mkdir(exist_ok=True)
            (Path(layer) / name).write_text("from below")
    (Path(top) / "replaced").write_text("from above")
    os.mknod(f"{top}/deleted", 0o20600, os.makedev(0, 0))
    (Path(top) / "opaque").mkdir()
    os.setxattr(f"{top}/opaque", "trusted.overlay.opaque", b"y")
    (Path(top) / "opaque/new").write_text("from above")
    image = build_path([top, middle, bottom], store)
    assert read_image(image, tmp_path) == {
        "file1": "layer 1",
        "file2": "layer 2",
        "file3": "layer 3",
        "opaque": "",
        "opaque/new": "from above",
        "replaced": "from above",
    }
    assert names(store) == whole(image)
    assert list((store / "cache/erofs/mnt").iterdir()) == []
    assert str(store / "cache/erofs") not in Path("/proc/self/mounts").read_text()


@pytest.mark.root
def test_images_and_directories_are_merged(store: Path, tmp_path: Path) -> None:
    """Too many images for a guest, or compressed ones, become one that it can use."""
    images = layer_images(store / "images", 2, "-zlz4hc")
    (directory,) = layer_dirs(store / "directory", 1)
    (Path(directory) / "file1").write_text("replaced")
    image = build_path([directory, *images], store)
    assert read_image(image, tmp_path) == {"file1": "replaced", "file2": "layer 2"}
    assert subprocess.run(["losetup", "-j", images[0]], capture_output=True, check=True).stdout == (
        b""
    )


@pytest.mark.root
def test_many_layers(store: Path, tmp_path: Path) -> None:
    image = build_path(layer_dirs(store, 60), store)
    assert len(read_image(image, tmp_path)) == 60
    with pytest.raises(HostError, match="more than one overlay mount can name"):
        build(layer_dirs(store / "n", 500), store)
    long = [layer_dirs(store / f"{number}-{'x' * 90}", 1)[0] for number in range(40)]
    with pytest.raises(HostError, match="more than one overlay mount can name"):
        build(long, store)


@pytest.mark.root
def test_whiteouts_of_a_single_layer_vanish(store: Path, tmp_path: Path) -> None:
    (only,) = layer_dirs(store, 1)
    os.mknod(f"{only}/deleted", 0o20600, os.makedev(0, 0))
    assert read_image(build_path([only], store), tmp_path) == {"file1": "layer 1"}


@pytest.mark.root
def test_times_owners_and_links_are_kept(store: Path, tmp_path: Path) -> None:
    (only,) = layer_dirs(store, 1)
    path = Path(only) / "file1"
    os.chown(path, 1234, 5678)
    path.chmod(0o4755)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    (Path(only) / "link").symlink_to("file1")
    image = build_path([only], store)
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
def test_equal_layers_give_equal_images(store: Path) -> None:
    """On another node, to the byte: wherever, whenever and in whatever order they are unpacked."""
    images = []
    for place, names in (("one", "abcdef"), ("two", "fedcba")):
        layers = layer_dirs(store / place)
        for layer in layers:
            for name in names:
                (Path(layer) / name).mkdir()
                (Path(layer) / name / "file").write_text(f"{name} of {Path(layer).name}")
            for path in Path(layer).rglob("*"):
                os.utime(path, ns=(0, 1_600_000_000_123_456_789))
        Path(layers[0]).chmod(0o751)
        images.append(Path(build_path(layers, store / place)).read_bytes())
    assert images[0] == images[1]


@pytest.mark.root
def test_one_chain_is_built_once(store: Path) -> None:
    chain = layer_dirs(store)
    made: list[tuple[str, int]] = []

    def run() -> None:
        path = build_path(chain, store)
        made.append((path, os.stat(path).st_ino))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 8
    assert len(set(made)) == 1
    assert names(store) == whole(made[0][0])


@pytest.mark.root
def test_a_failed_build_lets_the_others_try(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them wait for one that fails, then each finds the reason itself."""
    chain = layer_dirs(store)
    monkeypatch.setattr("vmcell_shim.erofs._MKFS", ["false"])
    failed: list[str] = []

    def run() -> None:
        try:
            build(chain, store)
        except HostError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failed) == 8
    assert all("ended with 1" in sentence for sentence in failed)
    assert names(store) == []
    monkeypatch.undo()
    assert states(store) == {}
    image = build_path(chain, store)
    assert names(store) == whole(image)


@pytest.mark.root
def test_image_of_a_removed_chain_is_collected(store: Path) -> None:
    old_image = build_path(layer_dirs(store / "old"), store)
    subprocess.run(["rm", "-r", str(store / "old")], check=True)
    (store / "cache/erofs/x.erofs.partial").write_text("left by a build that was killed")
    (store / "cache/erofs/y.erofs.json.new").write_text("{")
    (store / "cache/erofs/z.erofs.json").write_text("{}")
    assert states(store) == {old_image: "stale"}
    new_image = build_path(layer_dirs(store / "new"), store)
    assert names(store) == whole(new_image)


@pytest.mark.root
def test_layers_that_took_the_place_of_others(store: Path) -> None:
    """A store made anew counts its snapshots from 1 again."""
    chain = layer_dirs(store / "a", 1)
    old = build_path(chain, store)
    subprocess.run(["rm", "-r", str(store / "a")], check=True)
    assert layer_dirs(store / "a", 1) == chain
    new = build_path(chain, store)
    assert new != old
    assert names(store) == whole(new)


@pytest.mark.root
def test_an_image_in_use_is_never_removed(store: Path) -> None:
    held = build(layer_dirs(store / "old"), store)
    subprocess.run(["rm", "-r", str(store / "old")], check=True)
    assert states(store) == {held.path: "in use"}
    assert collect(str(store / "cache"), limit_mib=0) == []
    assert os.path.exists(held.path)
    held.close()
    held.close()
    assert [row.path for row in collect(str(store / "cache"), limit_mib=ROOMY_MIB)] == [held.path]
    assert names(store) == []


@pytest.mark.root
def test_an_image_is_free_when_its_user_was_killed(store: Path) -> None:
    chain = layer_dirs(store)
    script = (
        f"import sys; sys.path[:0] = {ROOTS!r}\n"
        "from vmcell_shim.image_cache import chain_image\n"
        "from vmcell_shim.layers import find_layers\n"
        f"held = chain_image(find_layers({chain!r}), {str(store / 'cache')!r}, limit_mib=100)\n"
        "print(held.path, flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        image = user.stdout.readline().strip()
        assert states(store) == {image: "in use"}
        user.kill()
    assert states(store) == {image: "idle"}


@pytest.mark.root
def test_an_image_that_is_used_keeps_its_digest(store: Path) -> None:
    """Else every restore of a sandbox would read all of it."""
    chain = layer_dirs(store, 1)
    image = build_path(chain, store)
    digests = Digests(str(store / "digests"))
    wait_until(lambda: time.time_ns() - os.stat(image).st_ctime_ns > 10**8, "a settled image")
    digest = digests.of_path(image)
    (record,) = (store / "digests").iterdir()
    record.write_text(record.read_text().replace(digest, "what was remembered"))
    os.utime(record_path(image), (1000, 1000))
    held = build(chain, store)
    held.close()
    assert held.path == image
    assert os.stat(record_path(image)).st_mtime > 1000, "it was used"
    assert digests.of_path(image) == "what was remembered"


@pytest.mark.root
def test_the_least_recently_used_go_first(store: Path) -> None:
    images = []
    for number in range(3):
        chain = layer_dirs(store / str(number), 1)
        (Path(chain[0]) / "big").write_bytes(os.urandom(3 << 20))
        images.append(build_path(chain, store))
        os.utime(record_path(images[-1]), (1000 + number, 1000 + number))
    # What is used again is not the oldest any more.
    held = build([str(store / "0/snapshots/1/fs")], store)
    assert held.path == images[0]
    rows = list_images(str(store / "cache"))
    assert [row.path for row in rows] == [images[0], images[2], images[1]]
    assert all(3 << 20 <= row.size_bytes < 5 << 20 for row in rows)
    removed = collect(str(store / "cache"), limit_mib=8)
    assert [row.path for row in removed] == [images[1]]
    # A build makes room too, and neither its own image nor one in use goes for it.
    chain = layer_dirs(store / "new", 1)
    (Path(chain[0]) / "big").write_bytes(os.urandom(3 << 20))
    new = build_path(chain, store, limit_mib=1)
    assert names(store) == whole(images[0], new)
    held.close()


def shorten(image: Path) -> None:
    os.truncate(image, image.stat().st_size - 4096)


def replace(image: Path) -> None:
    image.write_bytes(bytes(image.stat().st_size))


def exchange(image: Path) -> None:
    """A good image, but another one."""
    tree = image.parent.parent / "other"
    tree.mkdir(exist_ok=True)
    tree_image(str(tree), str(image))


def lose_record(image: Path) -> None:
    Path(f"{image}.json").unlink()


def damage_record(image: Path) -> None:
    Path(f"{image}.json").write_text('{"layers": [[1]]}')


def old_record(image: Path) -> None:
    Path(f"{image}.json").write_text(json.dumps(["/a/layer"]))


@pytest.mark.root
@pytest.mark.parametrize(
    "damage", [shorten, replace, exchange, lose_record, damage_record, old_record]
)
def test_a_damaged_image_is_not_used(store: Path, tmp_path: Path, damage: object) -> None:
    chain = layer_dirs(store)
    image = Path(build_path(chain, store))
    damage(image)  # type: ignore[operator]  # one of the functions above
    assert states(store) == {str(image): "damaged"}
    assert build_path(chain, store) == str(image)
    assert read_image(str(image), tmp_path)["file2"] == "layer 2"
    assert states(store) == {str(image): "idle"}
    damage(image)  # type: ignore[operator]  # as above
    assert [row.state for row in collect(str(store / "cache"), limit_mib=ROOMY_MIB)] == ["damaged"]
    assert names(store) == []


# mkfs ($0 is its image) outlives the shim that started it, and writes when another one has built.
LATE_WRITER = """exec 3>"$0"; kill -9 $PPID
n=0; until [ -e "${0%.partial}" ] || [ $n = 3000 ]; do n=$((n+1)); sleep 0.01; done
head -c 8192 /dev/zero >&3; mkdir "${0%/cache/*}/written-late"
"""


@pytest.mark.root
@pytest.mark.parametrize("step", ["mkfs", "digest", "rename", "collect"])
def test_a_build_killed_at_any_step_leaves_nothing_wrong(
    store: Path, tmp_path: Path, step: str
) -> None:
    chain = layer_dirs(store)
    places = {
        "mkfs": f"erofs._MKFS = ['sh', '-c', {LATE_WRITER!r}]",
        "digest": "image_cache.digest_head = lambda fd: os.kill(os.getpid(), 9)",
        "rename": "real = os.rename\nos.rename = lambda *a: (real(*a), os.kill(os.getpid(), 9))",
        "collect": "image_cache.collect = lambda *a, **b: os.kill(os.getpid(), 9)",
    }
    script = (
        f"import os, sys; sys.path[:0] = {ROOTS!r}\n"
        "from vmcell_shim import erofs, image_cache\n"
        "from vmcell_shim.layers import find_layers\n"
        f"{places[step]}\n"
        f"image_cache.chain_image(find_layers({chain!r}), {str(store / 'cache')!r}, limit_mib=9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    image = build_path(chain, store)
    if step == "mkfs":
        wait_until((store / "written-late").exists, "the late write")
    assert read_image(image, tmp_path)["file1"] == "layer 1"
    collect(str(store / "cache"), limit_mib=ROOMY_MIB)
    assert names(store) == whole(image)


@pytest.mark.root
def test_full_disk_is_one_sentence_and_no_half_file(store: Path, small_disk: Path) -> None:
    chain = layer_dirs(store)
    (Path(chain[0]) / "big").write_bytes(os.urandom(8 << 20))
    with pytest.raises(HostError, match="MiB are free") as caught:
        build(chain, small_disk)
    assert "\n" not in str(caught.value)
    assert names(small_disk) == []
