"""What is sent into a dev VM when something changed on the host."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from vmcell_tools import dev_sync


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    (root / "shim").mkdir(parents=True)
    (root / ".venv").mkdir()
    (root / ".venv" / "big").write_text("not sent")
    (root / "shim" / "a.py").write_text("1")
    (root / "link").symlink_to("shim/a.py")
    monkeypatch.setattr(dev_sync, "CHECKOUT", root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def test_the_manifest_has_files_and_links_but_no_caches(checkout: Path) -> None:
    manifest = dev_sync.take_manifest({"/etc/x": b"1"})
    assert set(manifest.files) == {"shim/a.py", "link"}
    assert manifest.builds == []
    assert set(manifest.configuration) == {"/etc/x"}
    assert dev_sync.take_manifest({"/etc/x": b"1"}) == manifest


def test_every_kind_of_change_shows(checkout: Path, tmp_path: Path) -> None:
    before = dev_sync.take_manifest({})
    (checkout / "shim" / "a.py").write_text("22")
    assert dev_sync.take_manifest({}).files != before.files
    (tmp_path / "cache/vmcell/oci-image/abc").mkdir(parents=True)
    (tmp_path / "cache/vmcell/oci-image/.building-x").mkdir()
    assert dev_sync.take_manifest({}).builds == ["abc"]
    assert dev_sync.take_manifest({"/etc/x": b""}).configuration != before.configuration


def test_the_archive_holds_paths_below_the_root_of_the_vm(checkout: Path) -> None:
    data = dev_sync.archive(
        checkout,
        ["shim/a.py", "link", "vanished.py"],
        {"/etc/vmcell/config.toml": b"x = 1\n", "/usr/local/bin/shim": b"#!/bin/sh\n"},
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: member for member in tar}
        below = str(checkout).lstrip("/")
        assert set(members) == {
            f"{below}/shim/a.py",
            f"{below}/link",
            "etc/vmcell/config.toml",
            "usr/local/bin/shim",
        }
        assert members[f"{below}/link"].linkname == "shim/a.py"
        assert members["usr/local/bin/shim"].mode == 0o755
        assert members["etc/vmcell/config.toml"].mode == 0o644
