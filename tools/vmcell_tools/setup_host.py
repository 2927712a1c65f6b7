"""`vmcell setup`: what a host needs besides packages — config.toml, the shim on containerd's PATH,
the zygote's unit for systemd (not enabled here), and what to add to containerd's configuration, as
files beside it.

Safe to run again: settings that the operator changed in config.toml stay, the paths of kernel and
base image follow the newest build. `uninstall` removes what this wrote and refuses while sandboxes
live. `root` is the root of the host's tree, another directory in tests.
"""

from __future__ import annotations

import compileall
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.config import DEFAULT_PATH, ShimConfig, parse_config, render_config
from vmcell_tools.base_image import find_base_image
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.containerd_setup import SNIPPET_DIRECTORY, snippet_files, unmerge
from vmcell_tools.kernel_build import find_kernel
from vmcell_tools.progress import Progress
from vmcell_tools.zygote_unit import UNIT_PATH, zygote_unit

SHIM_NAME = "containerd-shim-vmcell-v2"
SHIM_DIRECTORY = "/usr/local/bin"
CHECKOUT = Path(__file__).resolve().parents[2]
# Import order of vmcell_shim's packages; each is the folder that holds one.
SHIM_SOURCE_ROOTS = ("protos", "runtime", "shim")
SHIM_TEMPLATE = CHECKOUT / "shim" / SHIM_NAME
INTERPRETER_FLAGS = "-ISB"


@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """Absolute paths of the guest's kernel and base image."""

    kernel: str
    base_image: str


def built_artifacts(progress: Progress) -> Artifacts:
    """The newest builds of the cache; HostError naming the command for one that is missing."""
    cache = BuildCache.default()
    kernel = find_kernel(cache)
    if kernel is None:
        raise HostError("no guest kernel is built; run: vmcell kernel build")
    base_image = find_base_image(cache, progress)
    if base_image is None:
        raise HostError("no base image is built for this agent; run: vmcell image base")
    return Artifacts(kernel=str(kernel), base_image=str(base_image))


def chosen_artifacts(kernel: str | None, base_image: str | None, progress: Progress) -> Artifacts:
    """The given paths, the newest build for each that is None."""
    if kernel is not None and base_image is not None:
        return Artifacts(kernel=kernel, base_image=base_image)
    built = built_artifacts(progress)
    return Artifacts(kernel=kernel or built.kernel, base_image=base_image or built.base_image)


def render_shim(template: str, *, interpreter: str, roots: tuple[str, ...]) -> str:
    """The shim's executable: the template's `#!` line and SOURCE_ROOTS with this host's paths.

    The kernel passes one argument to a script's interpreter, hence the combined flags, and reads
    255 bytes of the line at most (execve(2)).
    """
    first = f"#!{interpreter} {INTERPRETER_FLAGS}"
    if len(os.fsencode(first)) > 255 or any(c.isspace() for c in interpreter):
        raise HostError(f"interpreter path {interpreter!r} cannot stand in a #! line; use another")
    lines = template.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("SOURCE_ROOTS = ")]
    if len(places) != 1 or not lines[0].startswith("#!"):
        raise HostError(f"{SHIM_NAME} is not the template that setup knows; check the checkout")
    lines[0] = first
    lines[places[0]] = f"SOURCE_ROOTS = {roots!r}"
    return "\n".join(lines) + "\n"


def shim_executable() -> str:
    """The shim's executable for this interpreter and checkout."""
    try:
        template = SHIM_TEMPLATE.read_text()
    except FileNotFoundError as error:
        raise HostError(f"{SHIM_TEMPLATE} is missing; run vmcell from its checkout") from error
    roots = tuple(str(CHECKOUT / folder) for folder in SHIM_SOURCE_ROOTS)
    return render_shim(template, interpreter=os.path.realpath(sys.executable), roots=roots)


def installed_shim() -> Path:
    """Where setup has put the shim; HostError when it has not."""
    path = Path(SHIM_DIRECTORY, SHIM_NAME)
    if not os.access(path, os.X_OK):
        raise HostError(f"{path} is missing; run: vmcell setup")
    return path


def compile_sources() -> None:
    """Byte code for what shims import: they run with -B and would compile it every time."""
    for folder in SHIM_SOURCE_ROOTS:
        compileall.compile_dir(CHECKOUT / folder, quiet=2)


def install(
    root: Path, artifacts: Artifacts, *, vcpus: int | None = None, memory_mib: int | None = None
) -> list[str]:
    """Write configuration, shim and unit below `root`; returns one line per thing that changed."""
    path = below(root, DEFAULT_PATH)
    config = replace(
        _present_config(path) or ShimConfig(kernel="", base_image=""),
        kernel=artifacts.kernel,
        base_image=artifacts.base_image,
    )
    if vcpus is not None:
        config = replace(config, default_vcpus=vcpus)
    if memory_mib is not None:
        config = replace(config, default_memory_mib=memory_mib)
    done = [
        write_file(path, render_config(config), 0o644),
        write_file(below(root, f"{SHIM_DIRECTORY}/{SHIM_NAME}"), shim_executable(), 0o755),
        write_file(below(root, UNIT_PATH), zygote_unit(f"{SHIM_DIRECTORY}/{SHIM_NAME}"), 0o644),
        *(write_file(below(root, path), text, 0o644) for path, text in snippet_files().items()),
        *(_make_private(below(root, path)) for path in (config.state_dir, config.cache_dir)),
    ]
    compile_sources()
    return [line for line in done if line]


def uninstall(root: Path) -> list[str]:
    """Remove what `install` and the merge wrote; CallerError while a sandbox is there."""
    path = below(root, DEFAULT_PATH)
    done = []
    config = _present_config(path)
    if config is not None:
        living = [
            f"{found.parent.name} in namespace {found.parent.parent.name}"
            for found in below(root, config.state_dir).glob("*/*/state.json")
        ]
        if living:
            raise CallerError(
                f"sandboxes are still there ({', '.join(living)}); end each with"
                " `ctr -n NAMESPACE task rm -f ID`, then uninstall again"
            )
        done.append(f"kept the image cache in {config.cache_dir}; delete it when nobody needs it")
    done += unmerge(root)
    written = [f"{SHIM_DIRECTORY}/{SHIM_NAME}", UNIT_PATH, *snippet_files()]
    for file in (path, *(below(root, name) for name in written)):
        if file.exists():
            remove_file(file)
            done.insert(0, f"removed {file}")
    for directory in (below(root, SNIPPET_DIRECTORY), path.parent):
        # What an operator put there stays.
        with suppress(FileNotFoundError, OSError):
            directory.rmdir()
    return done


def _present_config(path: Path) -> ShimConfig | None:
    """The settings on this host, or None; HostError for a file that cannot be read or is wrong."""
    try:
        return parse_config(path.read_text(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"cannot read {path} ({error}); repair or delete it") from error


def below(root: Path, path: str) -> Path:
    """`path` of the host in the tree at `root`."""
    return root / path.lstrip("/")


def write_file(path: Path, text: str, mode: int) -> str:
    """Replace `path` in one step; "" when it says the same already."""
    try:
        if path.read_text() == text and path.stat().st_mode & 0o777 == mode:
            return ""
    except FileNotFoundError:
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.chmod(mode)
        fresh.replace(path)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}; run it as root") from error
    return f"wrote {path}"


def remove_file(path: Path) -> None:
    """Deletes a file of ours; HostError that names it."""
    try:
        path.unlink()
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}; run it as root") from error


def _make_private(path: Path) -> str:
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        return ""
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}; run it as root") from error
    return f"made {path}"
