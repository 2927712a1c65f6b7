"""What a layer is, whatever name a snapshotter gives it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_trees import layer_dirs, layer_images

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.erofs_superblock import HEAD_BYTES, parse_superblock
from vmcell_shim.layers import find_layers, read_superblock


def test_superblock_of_a_real_image(tmp_path: Path) -> None:
    (image,) = layer_images(tmp_path, 1)
    superblock = read_superblock(image)
    assert superblock is not None
    assert (superblock.block_bytes, superblock.plain) == (4096, True)
    assert superblock.length_bytes == os.path.getsize(image)


def test_a_compressed_image_is_not_plain(tmp_path: Path) -> None:
    (image,) = layer_images(tmp_path, 1, "-zlz4hc")
    superblock = read_superblock(image)
    assert superblock is not None
    assert not superblock.plain


@pytest.mark.parametrize(
    ("offset", "value", "plain"),
    [
        (80, struct.pack("<I", 0x4), True),  # chunked files
        (80, struct.pack("<I", 0x8), False),  # a table of devices
        (80, struct.pack("<I", 0x80), False),  # 48-bit blocks, newer than the guest's kernel
        (12, b"\x09", False),  # blocks of 512 bytes, as an index of a tar has
    ],
)
def test_what_makes_an_image_plain(tmp_path: Path, offset: int, value: bytes, plain: bool) -> None:
    (image,) = layer_images(tmp_path, 1)
    head = bytearray(Path(image).read_bytes()[:HEAD_BYTES])
    head[1024 + offset : 1024 + offset + len(value)] = value
    superblock = parse_superblock(bytes(head))
    assert superblock is not None
    assert superblock.plain is plain


@given(st.binary(max_size=HEAD_BYTES))
def test_other_files_have_no_superblock(data: bytes) -> None:
    assert parse_superblock(data) is None
    magic = data[:1024].ljust(1024, b"\0") + b"\xe2\xe1\xf5\xe0" + data[1028:]
    superblock = parse_superblock(magic)
    assert superblock is None or superblock.block_bytes in [1 << bits for bits in range(9, 17)]


def test_an_image_that_was_cut_short_is_none(tmp_path: Path) -> None:
    (image,) = layer_images(tmp_path, 1)
    os.truncate(image, os.path.getsize(image) - 1)
    assert read_superblock(image) is None
    with pytest.raises(CallerError, match="neither a directory nor an EROFS image"):
        find_layers([image])


def test_kinds_of_layers(tmp_path: Path) -> None:
    (directory,) = layer_dirs(tmp_path / "a", 1)
    (image,) = layer_images(tmp_path / "b", 1)
    link = tmp_path / "link"
    link.symlink_to(image)
    found = find_layers([directory, str(link)])
    assert [layer.path for layer in found] == [directory, image]
    assert [layer.superblock is None for layer in found] == [True, False]
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CallerError, match="fifo"):
        find_layers([str(tmp_path / "fifo")])
    with pytest.raises(HostError, match="absent"):
        find_layers([str(tmp_path / "absent")])


def test_identity_changes_with_the_layer(tmp_path: Path) -> None:
    (directory,) = layer_dirs(tmp_path, 1)
    (layer,) = find_layers([directory])
    before = layer.identity
    assert layer.identity == before
    os.chmod(directory, 0o700)
    assert layer.identity != before
    (Path(directory) / "file1").unlink()
    os.rmdir(directory)
    with pytest.raises(HostError, match="cannot be read"):
        _ = layer.identity


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mount point"
    path.mkdir()
    try:
        yield path
    finally:
        while os.path.ismount(path):
            subprocess.run(["umount", path], check=True)


def mount(source: str, target: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "erofs", "-o", options, source, target], check=True)


@pytest.mark.root
def test_a_mounted_image_is_known_by_its_file(tmp_path: Path, mount_point: Path) -> None:
    """By a loop device; the second mount hides the first."""
    lower, upper = layer_images(tmp_path / "with space", 2)
    mount(lower, mount_point, "ro,loop")
    assert [layer.path for layer in find_layers([str(mount_point)])] == [lower]
    mount(upper, mount_point, "ro,loop")
    (layer,) = find_layers([str(mount_point)])
    assert layer.path == upper
    assert layer.superblock is not None


@pytest.mark.root
def test_a_mount_of_a_file_itself(tmp_path: Path, mount_point: Path) -> None:
    """Linux 6.12 on; mount(8) of util-linux 2.38 would make a loop device of it."""
    (image,) = layer_images(tmp_path, 1)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    call = "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True); "
    call += "args = [word.encode() for word in sys.argv[1:]]; "
    call += "sys.exit(libc.mount(args[0], args[1], b'erofs', 1, None) and ctypes.get_errno())"
    words = ["python3", "-c", call, image, str(mount_point)]
    code = subprocess.run(words, check=False).returncode
    if release < (6, 12):
        assert code == 15, "ENOTBLK"
        return
    assert code == 0
    (layer,) = find_layers([str(mount_point)])
    assert layer.path == image


@pytest.mark.root
def test_other_mounts_are_directories(tmp_path: Path, mount_point: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount_point], check=True)
    (layer,) = find_layers([str(mount_point)])
    assert (layer.path, layer.superblock) == (str(mount_point), None)
    (image,) = layer_images(tmp_path, 1)
    (mount_point / "inner").mkdir()
    mount(image, mount_point / "inner", "ro,loop")
    try:
        # A part of an image is no image.
        subprocess.run(["mount", "--bind", mount_point / "inner", mount_point], check=True)
        os.unlink(image)
        (layer,) = find_layers([str(mount_point)])
        assert layer.superblock is None, "its file is gone"
        subprocess.run(["umount", mount_point], check=True)
    finally:
        subprocess.run(["umount", mount_point / "inner"], check=True)
