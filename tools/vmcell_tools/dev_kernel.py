"""The dev VM's kernel: Debian's cloud kernel, unpacked into the cache, never installed.

`<cache>/devvm/kernel/<Debian version>/` holds `vmlinuz` and `lib/modules/<release>/` with depmod's
indexes. A kernel in the cache is used without asking the package archive again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.dev_state import cache_directory
from vmcell_tools.progress import Progress

META_PACKAGE = "linux-image-cloud-amd64"


@dataclass(frozen=True, kw_only=True)
class DevKernel:
    """An unpacked kernel package: `release` is what uname -r says."""

    directory: Path
    release: str

    @property
    def vmlinuz(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.directory / "lib" / "modules" / self.release


def find_kernel(progress: Progress) -> DevKernel:
    """The newest kernel of the cache, fetched first when there is none."""
    root = cache_directory() / "kernel"
    complete = sorted(root.glob("*/vmlinuz"), key=lambda path: path.stat().st_mtime)
    if complete:
        return _opened(complete[-1].parent)
    progress.step(f"fetching {META_PACKAGE} from the package archive")
    return _fetch(root, progress)


def _opened(directory: Path) -> DevKernel:
    (modules,) = (directory / "lib" / "modules").iterdir()
    return DevKernel(directory=directory, release=modules.name)


def _fetch(root: Path, progress: Progress) -> DevKernel:
    package = _real_package()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as name:
        work = Path(name)
        # The sandbox user of apt cannot write to a private directory and warns about it.
        _run(["apt-get", "-o", "APT::Sandbox::User=root", "-q", "download", package], work)
        (archive,) = work.glob("*.deb")
        version = archive.name.split("_")[1].replace("%3a", ":")
        progress.step(f"unpacking {package} {version}")
        _run(["dpkg", "-x", str(archive), "tree"], work)
        (image,) = work.glob("tree/boot/vmlinuz-*")
        release = image.name.removeprefix("vmlinuz-")
        _run(["depmod", "-b", "tree", release], work)
        done = work / "done"
        (done / "lib" / "modules").mkdir(parents=True)
        (work / "tree/lib/modules" / release).rename(done / "lib" / "modules" / release)
        image.rename(done / "vmlinuz")
        final = root / version
        shutil.rmtree(final, ignore_errors=True)
        done.rename(final)
    return DevKernel(directory=final, release=release)


def _real_package() -> str:
    """The package that the meta package stands for (linux-image-6.1.0-NN-cloud-amd64)."""
    shown = _run(["apt-cache", "depends", "--important", META_PACKAGE], Path("/"))
    match = re.search(r"Depends: (linux-image-[\w.+-]+)", shown)
    if match is None:
        raise HostError(
            f"apt knows no package {META_PACKAGE}; run apt-get update, and check that the"
            " package archive is Debian's for amd64"
        )
    return match[1]


def module_order(kernel: DevKernel, wanted: tuple[str, ...]) -> list[Path]:
    """Files of `wanted` and all they need, each after its needs (modules.dep lists them reversed).

    Raises HostError for a module the kernel has neither as a file nor built in.
    """
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        paths[_module_name(path)] = path
        needs[path] = rest.split()
    builtin = (kernel.modules / "modules.builtin").read_text().split()
    builtin_names = {_module_name(path) for path in builtin}
    order: dict[str, None] = {}
    for name in wanted:
        wanted_path = paths.get(name.replace("-", "_"))
        if wanted_path is None:
            if name.replace("-", "_") in builtin_names:
                continue
            raise HostError(f"kernel {kernel.release} has no module {name}; use another kernel")
        for path in (*reversed(needs[wanted_path]), wanted_path):
            order[path] = None
    return [kernel.modules / path for path in order]


def _module_name(path: str) -> str:
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def _run(command: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=300, check=False
        )
    except FileNotFoundError as error:
        raise HostError(f"{command[0]} is missing; apt-get install apt dpkg kmod") from error
    if done.returncode:
        raise HostError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
    return done.stdout
