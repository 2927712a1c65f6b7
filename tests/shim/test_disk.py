"""The sparse ext4 file a container writes to, and disks that a guest gets as they are."""

from __future__ import annotations

import filecmp
import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from vmcell_protos.errors import HostError
from vmcell_shim.disk import open_disk, writable_disk
from vmcell_shim.shape import GuestShape, machine_config

SHAPE = GuestShape(
    kernel="/dev/null",
    base_image="/dev/null",
    images=(),
    disk="",
    vcpus=1,
    memory_mib=64,
    spare_windows=0,
    nets=(),
    share=None,
    hostname="h",
    sysctls={},
    console_log="/dev/null",
    vmm_log="/dev/null",
)


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
    monkeypatch.setattr("vmcell_shim.sparse.FICLONE", 0)  # as where blocks cannot be shared
    writable_disk(str(tmp_path / "parts"), 64, str(tmp_path / "cache"))
    assert filecmp.cmp(tmp_path / "whole", tmp_path / "parts", shallow=False)


def test_impossible_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"mkfs\.ext4"):
        writable_disk(str(tmp_path / "disk"), 16, str(tmp_path / "cache"))
    assert list((tmp_path / "cache/ext4").iterdir()) == []
    assert not (tmp_path / "disk").exists()


def test_one_template_for_all_who_ask_at_once(tmp_path: Path) -> None:
    """Two containers of one pod are two threads of one shim; a killed maker's rest is no harm."""
    (tmp_path / "cache/ext4").mkdir(parents=True)
    (tmp_path / "cache/ext4/64-mib.ext4.partial").write_bytes(b"left" * 100_000_000)
    made: list[int] = []

    def make(number: int) -> None:
        writable_disk(str(tmp_path / f"disk{number}"), 64, str(tmp_path / "cache"))
        made.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == list(range(6))
    assert [path.name for path in (tmp_path / "cache/ext4").iterdir()] == ["64-mib.ext4"]
    checked = subprocess.run(
        ["e2fsck", "-fn", tmp_path / "disk5"], capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert (tmp_path / "disk5").stat().st_size == 64 << 20


@pytest.mark.root
def test_full_disk_while_a_disk_is_copied(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(HostError, match="No space left"):
        writable_disk(str(small_disk / "vmcell.ext4"), 10240, str(tmp_path / "cache"))
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"absent: No such file"):
        open_disk(str(tmp_path / "absent"))


@pytest.mark.root
def test_a_block_device_has_one_user(tmp_path: Path) -> None:
    """A loop device stands in for device-mapper's: the rule is the kernel's for all of them."""
    writable_disk(str(tmp_path / "disk"), 64, str(tmp_path / "cache"))
    words = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    device = subprocess.check_output(words, text=True).strip()
    try:
        fd = open_disk(device)
        with pytest.raises(HostError, match="mounted on the host or used by another guest"):
            open_disk(device)
        os.close(fd)
        target = tmp_path / "mounted"
        target.mkdir()
        subprocess.run(["mount", device, target], check=True)
        try:
            with pytest.raises(HostError, match="mounted on the host"):
                open_disk(device)
        finally:
            subprocess.run(["umount", target], check=True)
        os.close(open_disk(device, read_only=True))
        fd = open_disk(device)
        descriptors: list[int] = []
        with pytest.raises(HostError, match="used by another guest"):
            machine_config(replace(SHAPE, disk=device), descriptors)
        for used in (fd, *descriptors):
            os.close(used)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
