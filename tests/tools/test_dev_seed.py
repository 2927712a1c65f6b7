"""Images on a store before a VM has it: a real containerd, loop device and file system."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from vmcell_protos.errors import HostError
from vmcell_tools import dev_seed
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.dev_store import Store, opened_store
from vmcell_tools.oci_image import build_oci_image
from vmcell_tools.progress import Progress

pytestmark = pytest.mark.root
QUIET = Progress("test", quiet=True)
NAMES = ("small",)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BuildCache:
    """This host's builds; stores are the test's own."""
    found = BuildCache.default()
    build_oci_image("small", found, QUIET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def test_images_are_put_there_once(cache: BuildCache) -> None:
    with opened_store("seeded", QUIET) as store:
        assert store is not None
        assert dev_seed.seed(store, NAMES, cache, QUIET) == ["small"]
        remembered = json.loads(store.images.read_text())
        assert list(remembered) == ["small"]
        assert dev_seed.seed(store, NAMES, cache, QUIET) == []
        store.images.unlink()
        assert dev_seed.seed(store, NAMES, cache, QUIET) == [], "containerd has it"
        assert json.loads(store.images.read_text()) == remembered
        assert "vmcell-store" not in mounts()
        subprocess.run(["e2fsck", "-fn", store.path], check=True, capture_output=True)
        store.path.write_bytes(b"")
    with opened_store("seeded", QUIET) as store:
        assert store is not None
        assert not store.images.exists(), "a new disk has nothing"


def test_what_is_not_built_is_named(cache: BuildCache, tmp_path: Path) -> None:
    with opened_store("seeded", QUIET) as store:
        assert store is not None
        empty = BuildCache(tmp_path / "empty")
        with pytest.raises(HostError, match="run: vmcell image build small"):
            dev_seed.seed(store, NAMES, empty, QUIET)


def test_a_containerd_that_does_not_start_leaves_it_to_the_vm(
    cache: BuildCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dev_seed, "CONFIG", "this is no configuration {root}{state}{socket}")
    with opened_store("seeded", QUIET) as store, Progress("vmcell dev") as progress:
        assert store is not None
        assert dev_seed.seed(store, NAMES, cache, progress) == []
        assert not store.images.exists()
    said = capsys.readouterr().err
    assert "images are left for the VM to import: a containerd for the store does not" in said
    assert "vmcell-store" not in mounts()


def test_a_disk_that_cannot_be_mounted_is_an_error(cache: BuildCache, tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    with pytest.raises(HostError, match="mount failed"):
        dev_seed.seed(Store(path=tmp_path / "zeros", lock=-1), NAMES, cache, QUIET)
