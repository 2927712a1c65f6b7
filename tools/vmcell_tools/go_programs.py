"""containerd 2.x, ctr and nerdctl for the tests: published Go modules, compiled into the cache.

Debian 12 has containerd 1.6 and no nerdctl. `<kind>/<digest>/` of the cache holds static binaries;
the digest covers module, version and flags. Each module is built as its own main module, with its
own go.sum, after its checksum was compared with the one noted here (Go's reference on modules).
It is built in a copy, because what only a module's tests need may not be published with it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.progress import Progress

# Raise it when the flags below change what comes out.
RECIPE = "1"
DOWNLOAD_DEADLINE_S = 900.0
COMPILE_DEADLINE_S = 1800.0
TOLD_EVERY_S = 10.0
BUILDS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class GoModule:
    """One published module and which of its commands are built.

    `checksum` is that of the module's files ("h1:…", as in a go.sum). `version_variable` is the Go
    variable that holds the program's own version, which a build from a module leaves unknown.
    """

    kind: str
    module: str
    version: str
    checksum: str
    commands: tuple[str, ...]
    tags: tuple[str, ...]
    version_variable: str
    # Files for its tests beside the programs', and the unpublished module that those import.
    left_out: tuple[str, ...] = ()
    unpublished: str = ""

    @property
    def digest(self) -> str:
        parts = (self.module, self.version, self.checksum, *self.commands, "", *self.tags)
        return input_digest(RECIPE, *parts)


CONTAINERD = GoModule(
    kind="containerd",
    module="github.com/containerd/containerd/v2",
    version="v2.3.7",
    checksum="h1:7PGbgAVKE4ieQjFPv7+kwAv7f9dCtRpExZwjExHD/Fk=",
    commands=("containerd", "ctr"),
    tags=("no_btrfs", "no_zfs", "no_devmapper", "no_tracing", "no_rdt"),
    version_variable="github.com/containerd/containerd/v2/version.Version",
)
NERDCTL = GoModule(
    kind="nerdctl",
    module="github.com/containerd/nerdctl/v2",
    version="v2.3.5",
    checksum="h1:auYeWpIM29NUvqWxFvar8HIbSVrGBn6dRPx45rrUApY=",
    commands=("nerdctl",),
    tags=("no_ipfs",),
    version_variable="github.com/containerd/nerdctl/v2/pkg/version.Version",
    left_out=("cmd/nerdctl/helpers/testing.go", "cmd/nerdctl/helpers/testing_linux.go"),
    unpublished="github.com/containerd/nerdctl/mod/tigron",
)


def find_programs(module: GoModule, cache: BuildCache) -> Path | None:
    """The directory of the built commands, or None when `build_programs` would compile."""
    return cache.find(module.kind, module.digest)


def build_programs(module: GoModule, cache: BuildCache, progress: Progress) -> Path:
    """The directory with the module's commands, compiled when the cache has none.

    Raises HostError without Go, without the module proxy, for a module whose checksum is another,
    and for whatever the compiler says.
    """

    def fill(directory: Path) -> None:
        source = _download(module, directory, progress)
        with tempfile.TemporaryDirectory(prefix="vmcell-go-") as scratch:
            copy = Path(scratch) / "module"
            _copy(module, source, copy)
            _compile(module, copy, directory, progress)

    return cache.build(module.kind, module.digest, fill, progress)


def drop_old_builds(module: GoModule, cache: BuildCache) -> None:
    """Leaves the builds of that module that were asked for last."""
    cache.keep_newest(module.kind, BUILDS_KEPT)


def _go() -> str:
    path = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if path is None:
        raise HostError("Go is not installed, so containerd 2.x and nerdctl cannot be built")
    return path


def _download(module: GoModule, scratch: Path, progress: Progress) -> Path:
    progress.step(f"fetching {module.module} {module.version}")
    # Outside of any module; what this one needs is fetched by the build.
    output = run_step(
        [_go(), "mod", "download", "-json", f"{module.module}@{module.version}"],
        directory=scratch,
        deadline_s=DOWNLOAD_DEADLINE_S,
        environment={"GOFLAGS": "-mod=mod", "GOWORK": "off"},
    )
    try:
        told, _ = json.JSONDecoder().raw_decode(output[output.index("{") :])
        source, checksum = Path(told["Dir"]), told["Sum"]
    except (ValueError, KeyError) as error:
        raise HostError(f"go mod download said of {module.module}: {output[-300:]}") from error
    if checksum != module.checksum:
        raise HostError(
            f"{module.module} {module.version} has the checksum {checksum}, not {module.checksum};"
            " do not use it before it is known why"
        )
    return source


def _copy(module: GoModule, source: Path, copy: Path) -> None:
    shutil.copytree(source, copy)
    for path in (copy, *copy.rglob("*")):
        # Files of Go's module cache are read-only.
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)
    for name in module.left_out:
        (copy / name).unlink()
    if module.unpublished:
        edits = (f"-droprequire={module.unpublished}", f"-dropreplace={module.unpublished}@v0.0.0")
        run_step(
            [_go(), "mod", "edit", *edits],
            directory=copy,
            deadline_s=DOWNLOAD_DEADLINE_S,
            environment={"GOFLAGS": "", "GOWORK": "off"},
        )


def _compile(module: GoModule, source: Path, directory: Path, progress: Progress) -> None:
    what = f"{', '.join(module.commands)} {module.version}"
    progress.step(f"compiling {what}; two minutes of CPU time, more on a busy machine")
    packages, told = 0, time.monotonic()

    def count(line: str) -> None:
        nonlocal packages, told
        packages += 1
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            progress.step(f"compiling {what}: {packages} packages done")

    run_step(
        [
            _go(),
            "build",
            *("-v", "-trimpath", "-mod=readonly", "-buildvcs=false"),
            *("-tags", ",".join(module.tags)),
            *("-ldflags", f"-s -w -X {module.version_variable}={module.version}"),
            *("-o", f"{directory}{os.sep}"),
            *(f"./cmd/{name}" for name in module.commands),
        ],
        directory=source,
        deadline_s=COMPILE_DEADLINE_S,
        environment={"CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
        on_line=count,
    )
