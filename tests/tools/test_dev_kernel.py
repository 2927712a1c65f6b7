"""Modules of the dev VM's kernel, in the order in which they can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcell_protos.errors import HostError
from vmcell_tools.dev_kernel import DevKernel, find_kernel, module_order
from vmcell_tools.progress import Progress

MODULES_DEP = """\
kernel/fs/fuse/virtiofs.ko: kernel/fs/fuse/fuse.ko kernel/virtio/virtio.ko kernel/virtio/ring.ko
kernel/fs/fuse/fuse.ko:
kernel/virtio/ring.ko:
kernel/virtio/virtio.ko: kernel/virtio/ring.ko
kernel/kvm/kvm-amd.ko: kernel/virtio/ring.ko
"""


@pytest.fixture
def kernel(tmp_path: Path) -> DevKernel:
    found = DevKernel(directory=tmp_path, release="6.1.0-1-cloud-amd64")
    found.modules.mkdir(parents=True)
    (found.modules / "modules.dep").write_text(MODULES_DEP)
    (found.modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return found


def test_each_module_stands_after_its_needs_once(kernel: DevKernel) -> None:
    order = [path.stem for path in module_order(kernel, ("virtiofs", "kvm-amd", "virtio"))]
    assert order == ["ring", "virtio", "fuse", "virtiofs", "kvm-amd"]


def test_built_in_drivers_need_no_file(kernel: DevKernel) -> None:
    assert module_order(kernel, ("ext4",)) == []


def test_a_missing_driver_is_named(kernel: DevKernel) -> None:
    with pytest.raises(HostError, match="no module vhost_net"):
        module_order(kernel, ("fuse", "vhost_net"))


def test_a_kernel_in_the_cache_is_taken_without_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    directory = tmp_path / "vmcell/devvm/kernel/6.1.9-1"
    (directory / "lib/modules/6.1.0-9-cloud-amd64").mkdir(parents=True)
    (directory / "vmlinuz").write_bytes(b"")
    found = find_kernel(Progress("test", quiet=True))
    assert (found.directory, found.release) == (directory, "6.1.0-9-cloud-amd64")


def test_without_apt_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostError, match="apt-cache is missing"):
        find_kernel(Progress("test", quiet=True))
    assert not list(tmp_path.rglob("*.deb"))
