"""Which containerds a test runs against: Debian's, and a 2.x out of the build cache.

`vmcell dev containerd` builds the latter, which needs Go; so a test that wants it is skipped where
it is not there, and says what is missing. All else that a test needs is never skipped.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmcell_tools.build_cache import BuildCache
from vmcell_tools.go_programs import CONTAINERD, NERDCTL, GoModule, find_programs

DEBIAN, NEWER = "debian", "2.x"


@dataclass(frozen=True, kw_only=True)
class Release:
    """`directory` holds its programs; None where they stand in PATH. `config` is the version of
    the configuration that it is given."""

    name: str
    config: int
    directory: Path | None

    def program(self, name: str) -> str:
        """What to call for `containerd` or `ctr`."""
        return str(self.directory / name) if self.directory else name


def find_release(name: str) -> Release:
    """DEBIAN or NEWER; skips the test when it is not there.

    VMCELL_CONTAINERD names a directory with another one to take Debian's place.
    """
    if name == DEBIAN:
        other = os.environ.get("VMCELL_CONTAINERD")
        return Release(name=name, config=2, directory=Path(other) if other else None)
    return Release(name=name, config=3, directory=find_or_skip(CONTAINERD))


def find_nerdctl() -> Path:
    """The program; skips the test when it is not there."""
    return find_or_skip(NERDCTL) / "nerdctl"


def find_or_skip(module: GoModule) -> Path:
    """The directory of the module's programs; skips the test when the cache has none."""
    directory = find_programs(module, BuildCache.default())
    if directory is None:
        missing = "" if shutil.which("go") else " (needs Go, which is not installed)"
        pytest.skip(
            f"{module.kind} {module.version} is not built; run: vmcell dev containerd{missing}"
        )
    return directory
