"""Debian packages without installing them: exact versions, their files, a tree unpacked from them.

Which versions apt would take today is remembered under a digest of apt's own lists, so asking again
costs nothing until `apt-get update` brings something new. Nothing here runs a maintainer script.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.progress import Progress

APT_LISTS = Path("/var/lib/apt/lists")
RESOLVED_KIND = "debian-versions"
ARCHIVES_KIND = "debian-packages"
RESOLVED_KEPT = 16
APT_DEADLINE_S = 300.0
DOWNLOAD_DEADLINE_S = 900.0
UNPACK_DEADLINE_S = 120.0
# On bookworm these are links into /usr, made by the installer and by no package.
MERGED_USR = ("bin", "lib", "lib64", "sbin")
# 'http://…/libc6_2.36-9_amd64.deb' libc6_2.36-9_amd64.deb 2759320 SHA256:…
_URI_LINE = re.compile(r"^'[^']+' (?P<name>[a-z0-9.+-]+)_(?P<version>[^_]+)_\w+\.deb ", re.M)
_INSTALL_LINE = re.compile(r"^Inst (?P<name>[a-z0-9.+-]+)(:\w+)? .*?\((?P<version>\S+) ", re.M)


class Package(NamedTuple):
    """One binary package in one version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}={self.version}"


def named_versions(
    cache: BuildCache, names: Sequence[str], progress: Progress
) -> tuple[Package, ...]:
    """The versions apt would download of exactly `names`, nothing they depend on."""
    command = ["apt-get", "download", "--print-uris", *names]
    return _remembered(cache, command, _URI_LINE, progress)


def closure_versions(
    cache: BuildCache, names: Sequence[str], progress: Progress
) -> tuple[Package, ...]:
    """All packages of a fresh system that has `names` (apt's `?essential` allowed)."""
    command = [
        *("apt-get", "install", "--simulate"),
        *("-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false"),
        *names,
    ]
    return _remembered(cache, command, _INSTALL_LINE, progress)


def _remembered(
    cache: BuildCache, command: list[str], line: re.Pattern[str], progress: Progress
) -> tuple[Package, ...]:
    def fill(directory: Path) -> None:
        progress.step("asking apt for package versions")
        shown = run_step(command, deadline_s=APT_DEADLINE_S)
        found = [Package(m["name"], m["version"].replace("%3a", ":")) for m in line.finditer(shown)]
        if not found:
            raise HostError(
                f"apt knows no version of {command[-1]}; run apt-get update, and check that the"
                " package archive is Debian 12's"
            )
        (directory / "packages").write_text("".join(f"{package}\n" for package in sorted(found)))

    digest = input_digest(_lists_fingerprint(), *command)
    resolved = cache.build(RESOLVED_KIND, digest, fill, progress) / "packages"
    cache.keep_newest(RESOLVED_KIND, RESOLVED_KEPT)
    pairs = (row.partition("=") for row in resolved.read_text().splitlines())
    return tuple(Package(name, version) for name, _, version in pairs)


def _lists_fingerprint() -> str:
    """Changes whenever apt-get update has changed an index."""
    rows = []
    for path in sorted(APT_LISTS.glob("*_Packages*")):
        status = path.stat()
        rows.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    if not rows:
        raise HostError(f"apt has no package lists in {APT_LISTS}; run: apt-get update")
    return "\n".join(rows)


def package_files(
    cache: BuildCache, packages: Sequence[Package], progress: Progress
) -> tuple[Path, ...]:
    """The .deb files of exactly these versions; apt checks their signatures and hashes."""

    def fill(directory: Path) -> None:
        progress.step(f"downloading {len(packages)} packages from the archive")
        # apt's own sandbox user may not write here, and apt warns about that.
        run_step(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *map(str, packages)],
            directory=directory,
            deadline_s=DOWNLOAD_DEADLINE_S,
        )
        missing = len(packages) - len(list(directory.glob("*.deb")))
        if missing:
            raise HostError(f"apt-get download left out {missing} packages; run it again")

    directory = cache.build(
        ARCHIVES_KIND, input_digest(*map(str, sorted(packages))), fill, progress
    )
    return tuple(sorted(directory.glob("*.deb")))


def unpack(archives: Sequence[Path], tree: Path) -> None:
    """Unpack into the new directory `tree`; /bin, /lib, /lib64 and /sbin become links into /usr."""
    tree.mkdir()
    for archive in archives:
        run_step(["dpkg-deb", "--extract", archive, tree], deadline_s=UNPACK_DEADLINE_S)
    for name in MERGED_USR:
        split = tree / name
        (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
        if split.is_dir():
            shutil.copytree(split, tree / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(split)
        split.symlink_to(f"usr/{name}")
