"""Wheels from PyPI for the Python of our images, exactly those of a lock file.

`python-wheels/<digest of the lock>/*.whl`, fetched by pip, which checks every hash.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.progress import Progress

KIND = "python-wheels"
KEPT = 4
# Debian 12's.
PYTHON_VERSION = "3.11"
# glibc 2.36 takes all of these; old pips do not know that the newer ones contain the older.
PLATFORMS = (
    *("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64"),
    *("manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"),
    *("manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)
DOWNLOAD_DEADLINE_S = 1800.0


def locked_names(lock: str) -> list[str]:
    """The requirements of a lock file, "name==version" each."""
    rows = (row.split()[0] for row in lock.splitlines() if row[:1].isalnum())
    return [row for row in rows if "==" in row]


def wheels(lock: Path, cache: BuildCache, progress: Progress) -> tuple[Path, ...]:
    """The wheels that `lock` names, downloaded when the cache has them not.

    Raises HostError when one cannot be had or is not what the lock says.
    """
    text = lock.read_text()
    wanted = locked_names(text)

    def fill(directory: Path) -> None:
        progress.step(f"downloading {len(wanted)} Python packages")
        run_step(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input"),
                *("--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
                *("--require-hashes", "--implementation", "cp"),
                *("--python-version", PYTHON_VERSION),
                *(f"--platform={platform}" for platform in PLATFORMS),
                *("--requirement", lock, "--dest", directory),
            ],
            deadline_s=DOWNLOAD_DEADLINE_S,
        )
        found = len(list(directory.glob("*.whl")))
        if found != len(wanted):
            raise HostError(f"pip brought {found} of {len(wanted)} packages; run it again")

    directory = cache.build(KIND, wheels_digest(lock), fill, progress)
    cache.keep_newest(KIND, KEPT)
    return tuple(sorted(directory.glob("*.whl")))


def wheels_digest(lock: Path) -> str:
    """What names the wheels of `lock` in the cache."""
    return input_digest(PYTHON_VERSION, lock.read_text())
