"""A shim, own file systems (they need root), a zygote and a bundle for the tests that want them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shim_harness import Shim, running_shim
from snapshot_calls import other_shim
from zygote_harness import Zygote, make_bundle, shims


@contextmanager
def _mounted(path: Path, *options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--recursive", path], check=True)


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shim]:
    with running_shim(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def other(shim: Shim) -> Iterator[Shim]:
    """One more shim of the same host."""
    with other_shim(shim) as running:
        yield running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is full after 2 MiB."""
    with _mounted(tmp_path / "small", "-o", "size=2m") as path:
        yield path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, because layers below an overlay must not be on one themselves."""
    with _mounted(tmp_path / "store") as path:
        yield path


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because a socket's path has 106 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="vmcell-z") as directory:
        yield Path(directory)


@pytest.fixture
def zygote(folder: Path) -> Iterator[Zygote]:
    started = Zygote(str(folder / "z"))
    started.start()
    yield started
    started.kill()


@pytest.fixture
def bundle(folder: Path) -> Iterator[Path]:
    made = make_bundle(folder, "b1")
    yield made
    for pid in shims(made):
        os.kill(pid, signal.SIGKILL)
