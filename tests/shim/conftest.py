"""File systems of a test's own. They need root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def _mounted(path: Path, *options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--recursive", path], check=True)


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
