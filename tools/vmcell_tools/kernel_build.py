"""The guest kernel: Debian's kernel source and our fragment make an ELF vmlinux in the cache.

`kernel/<digest>/` holds `vmlinux` (stripped), `config` and `System.map`; the digest covers the
source's version, the fragment without its comments, and this recipe. The source tree stays in
`kernel-tree/<version>-<patterns>/` until a build succeeds, so an interrupted one goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.kernel_config import canonical, differences, parse_config
from vmcell_tools.progress import Progress

KIND = "kernel"
TREE_KIND = "kernel-tree"
SOURCE_PACKAGE = "linux-source-6.12"
SOURCE_TARBALL = Path("/usr/src/linux-source-6.12.tar.xz")
ARCHITECTURE = "x86_64"
FRAGMENT = Path(__file__).resolve().parents[2] / "kernel" / f"{ARCHITECTURE}.config"
# Raise it when the steps below change what comes out.
RECIPE = "1"
# Nothing of the builder may show in the kernel: the same inputs give the same bytes.
FIXED_IDENTITY = {
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01 00:00:00 UTC",
    "KBUILD_BUILD_USER": "vmcell",
    "KBUILD_BUILD_HOST": "vmcell",
    "KBUILD_BUILD_VERSION": "1",
}
# Never read by an x86 build, and two thirds of the files. In tar's patterns `*` matches `/` too.
# Kconfig files stay, all of them: the parser follows every `source`, whatever the architecture.
UNUSED_IN_SOURCE = (
    "Documentation/[a-z]*",
    "tools/testing",
    "drivers/gpu/drm/*/*.[ch]",
    *(
        f"arch/{name}/*.{kind}"
        for name in ("arm", "arm64", "mips", "powerpc", "s390", "sparc", "riscv")
        for kind in ("[chS]", "dts", "dtsi")
    ),
)
UNPACK_DEADLINE_S = 600.0
CONFIGURE_DEADLINE_S = 300.0
COMPILE_DEADLINE_S = 5400.0
TOLD_EVERY_FILES = 100


def find_kernel(cache: BuildCache) -> Path | None:
    """The vmlinux that `build_kernel` would return at once, or None when it would build."""
    directory = cache.find(KIND, _digest(_source_version(), _asked()))
    return directory / "vmlinux" if directory else None


def build_kernel(cache: BuildCache, progress: Progress, *, keep_tree: bool = False) -> Path:
    """The guest's vmlinux, built when the cache has none for this source and configuration.

    `keep_tree` leaves the 2 GB of source and objects, for quick rebuilds while options change.
    Raises HostError for missing tools, options that Kconfig did not honour, and a full disk.
    """
    version, asked = _source_version(), _asked()

    def fill(directory: Path) -> None:
        tree = _unpacked(cache, version, progress)
        try:
            _configure(tree, asked, progress)
            _compile(tree, progress)
        except OSError:
            # a full disk: the half-built tree is what fills it
            shutil.rmtree(tree)
            raise
        progress.step("stripping vmlinux")
        run_step(
            ["strip", "--strip-all", "-o", directory / "vmlinux", tree / "vmlinux"],
            deadline_s=CONFIGURE_DEADLINE_S,
        )
        shutil.copyfile(tree / ".config", directory / "config")
        shutil.copyfile(tree / "System.map", directory / "System.map")
        if not keep_tree:
            shutil.rmtree(tree)

    return cache.build(KIND, _digest(version, asked), fill, progress) / "vmlinux"


def _asked() -> dict[str, str]:
    try:
        return parse_config(FRAGMENT.read_text(), FRAGMENT.name)
    except FileNotFoundError as error:
        raise HostError(f"{FRAGMENT} is missing; run vmcell from its own checkout") from error


def _digest(version: str, asked: dict[str, str]) -> str:
    return input_digest(RECIPE, ARCHITECTURE, version, canonical(asked))


def _source_version() -> str:
    """The Debian version of the installed source package."""
    missing = HostError(f"{SOURCE_PACKAGE} is not installed; run: apt-get install {SOURCE_PACKAGE}")
    if not SOURCE_TARBALL.exists():
        raise missing
    status = run_step(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", SOURCE_PACKAGE],
        deadline_s=60,
    )
    state, _, version = status.partition(" ")
    if state != "installed":
        raise missing
    return version


def _unpacked(cache: BuildCache, version: str, progress: Progress) -> Path:
    def fill(directory: Path) -> None:
        progress.step(f"unpacking {SOURCE_TARBALL.name} {version}")
        excluded = [f"--exclude={SOURCE_PACKAGE}/{pattern}" for pattern in UNUSED_IN_SOURCE]
        run_step(
            ["tar", "-x", "--strip-components=1", *excluded, "-f", SOURCE_TARBALL],
            directory=directory,
            deadline_s=UNPACK_DEADLINE_S,
        )

    # A tree that was unpacked by other patterns is another tree.
    patterns = hashlib.sha256(repr(UNUSED_IN_SOURCE).encode()).hexdigest()[:8]
    return cache.build(TREE_KIND, f"{version}-{patterns}", fill, progress)


def _configure(tree: Path, asked: dict[str, str], progress: Progress) -> None:
    progress.step("configuring the kernel")
    run_step(
        ["make", "-s", f"ARCH={ARCHITECTURE}", "allnoconfig"],
        directory=tree,
        environment={"KCONFIG_ALLCONFIG": str(FRAGMENT)},
        deadline_s=CONFIGURE_DEADLINE_S,
    )
    got = parse_config((tree / ".config").read_text(), ".config")
    wrong = differences(asked, got)
    if wrong:
        named = ", ".join(f"{row.option} asked {row.asked} got {row.got}" for row in wrong)
        raise HostError(
            f"the kernel cannot be configured as {FRAGMENT.name} asks: {named}; look up what these"
            " options depend on, or correct the lines"
        )


def _compile(tree: Path, progress: Progress) -> None:
    jobs = len(os.sched_getaffinity(0))
    progress.step(f"compiling the kernel with {jobs} jobs; about 9 minutes of CPU time")
    compiled = 0

    def count(line: str) -> None:
        nonlocal compiled
        if line.startswith(("  CC ", "  AS ")):
            compiled += 1
            if compiled % TOLD_EVERY_FILES == 0:
                progress.step(f"compiling the kernel: {compiled} files done")

    run_step(
        ["make", f"ARCH={ARCHITECTURE}", f"-j{jobs}", "vmlinux"],
        directory=tree,
        environment=FIXED_IDENTITY,
        deadline_s=COMPILE_DEADLINE_S,
        on_line=count,
        log=tree / "vmcell-build.log",
    )
