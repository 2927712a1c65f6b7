"""A zygote and a bundle for the tests that want them."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from zygote_harness import Zygote, make_bundle, shims


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
