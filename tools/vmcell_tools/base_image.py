"""The guest's base image: a read-only EROFS image of CPython from Debian packages and our agent.

It is the root of every guest (`pmem0`, DAX), so one copy in the host's page cache serves all of
them. `base-image/<digest>/base.erofs`; two layers of cache, so that a change of the agent costs a
second: the interpreter's tree by package versions, the image by that and our files.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.debian_tree import Package, named_versions, package_files, unpack
from vmcell_tools.progress import Progress

KIND = "base-image"
PYTHON_KIND = "guest-python"
IMAGE_NAME = "base.erofs"
IMAGES_KEPT = 4
# Raise it when the steps below change what comes out.
RECIPE = "1"
PYTHON = "python3.11"
# What the interpreter and its ctypes link to, and libgcc_s, which glibc loads to end a thread.
PACKAGES = (
    *("libc6", "libgcc-s1", "zlib1g", "libexpat1", "libffi8"),
    *(f"{PYTHON}-minimal", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib"),
)
# Whole parts of the packages that no guest process uses.
TRIMMED = (
    *("usr/share", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/x86_64-linux-gnu/audit", "etc"),
    *("usr/bin/python3.11-config", "usr/lib/valgrind", "usr/include", "var"),
    *(
        f"usr/lib/{PYTHON}/{name}"
        for name in ("test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "distutils")
    ),
    *(f"usr/lib/{PYTHON}/{name}" for name in ("tkinter", "turtledemo", "turtle.py")),
)
# Extension modules whose libraries are not in the image; hashlib falls back to its own code.
TRIMMED_EXTENSIONS = (
    *("_bz2", "_lzma", "_ssl", "_hashlib", "_sqlite3", "_curses", "_curses_panel", "readline"),
    *("_dbm", "_gdbm", "_uuid", "_crypt", "nis", "_tkinter", "ossaudiodev"),
)
AGENT_PACKAGES = ("vmcell_agent", "vmcell_protos", "h11")
# vmcell_protos.pb needs google.protobuf and is for noded only.
LEFT_OUT = ("pb", "__pycache__", "_tests", "tests")
AGENT_ROOT = "usr/lib/vmcell/python"
MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp", "mnt")
# The kernel starts a script like any program, with one argument for its interpreter at most.
# Imports make no garbage; PID 1 turns the collector on again once it is ready.
INIT = f"""#!/usr/bin/{PYTHON} -ISB
import gc, sys
gc.disable()
sys.path.append("/{AGENT_ROOT}")
from vmcell_agent.__main__ import main
sys.exit(main())
"""
# virtio 1.2 leaves the size open, but the guest's memory map takes pmem in these steps only.
SIZE_STEP_BYTES = 2 << 20
UUID_SPACE = uuid.UUID("6f0c8a52-4a54-4c0e-9d38-5ad5e5e3c2a7")
COMPILE_DEADLINE_S = 300.0
MKFS_DEADLINE_S = 300.0


def find_base_image(cache: BuildCache, progress: Progress) -> Path | None:
    """The image that `build_base_image` would return at once, or None when it would build."""
    directory = cache.find(KIND, _digest(named_versions(cache, PACKAGES, progress)))
    return directory / IMAGE_NAME if directory else None


def build_base_image(cache: BuildCache, progress: Progress) -> Path:
    """The base image of today's packages and this checkout's agent, built when it is not cached."""
    packages = named_versions(cache, PACKAGES, progress)
    digest = _digest(packages)

    def fill(directory: Path) -> None:
        python = _python_tree(cache, packages, progress)
        progress.step("making the guest's base image")
        tree = directory / "tree"
        run_step(["cp", "--archive", "--link", python, tree], deadline_s=MKFS_DEADLINE_S)
        _add_agent(tree, python)
        make_erofs(tree, directory / IMAGE_NAME, uuid.uuid5(UUID_SPACE, digest))
        shutil.rmtree(tree)

    image = cache.build(KIND, digest, fill, progress) / IMAGE_NAME
    cache.keep_newest(KIND, IMAGES_KEPT)
    return image


def make_erofs(tree: Path, image: Path, identity: uuid.UUID) -> None:
    """`tree` as an uncompressed EROFS image, all files root's, the same bytes for the same tree.

    noinline_data: a file whose tail is stored beside its inode is never mapped by DAX.
    """
    run_step(
        [
            *("mkfs.erofs", "--quiet", "-E", "noinline_data", "-x", "-1", "--all-root"),
            *("-T", "0", "-U", str(identity), image, tree),
        ],
        deadline_s=MKFS_DEADLINE_S,
    )
    size_bytes = image.stat().st_size
    with image.open("r+b") as file:
        file.truncate(-(-size_bytes // SIZE_STEP_BYTES) * SIZE_STEP_BYTES)


def _digest(packages: tuple[Package, ...]) -> str:
    files: list[str | bytes] = []
    for target, source in _agent_files():
        files += [target, source.read_bytes()]
    return input_digest(RECIPE, INIT, *TRIMMED, *map(str, packages), *files)


def _agent_files() -> Iterator[tuple[str, Path]]:
    """Path below AGENT_ROOT and source of each Python file that our side adds."""
    for name in AGENT_PACKAGES:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise HostError(f"the Python package {name} is not installed; run: pip install {name}")
        folder = Path(spec.submodule_search_locations[0])
        for source in sorted(folder.rglob("*.py")):
            inner = source.relative_to(folder)
            if not set(inner.parts) & set(LEFT_OUT):
                yield f"{name}/{inner}", source


def _python_tree(cache: BuildCache, packages: tuple[Package, ...], progress: Progress) -> Path:
    """The unpacked, trimmed and compiled interpreter."""

    def fill(directory: Path) -> None:
        archives = package_files(cache, packages, progress)
        progress.step("unpacking the guest's Python")
        tree = directory / "tree"
        unpack(archives, tree)
        _trim(tree)
        for name in MOUNT_POINTS:
            (tree / name).mkdir(exist_ok=True)
        progress.step("compiling the guest's standard library")
        _compile(tree, tree, f"usr/lib/{PYTHON}")

    digest = input_digest(RECIPE, *TRIMMED, *TRIMMED_EXTENSIONS, *map(str, packages))
    directory = cache.build(PYTHON_KIND, digest, fill, progress)
    cache.keep_newest(PYTHON_KIND, IMAGES_KEPT)
    return directory / "tree"


def _trim(tree: Path) -> None:
    for name in TRIMMED:
        path = tree / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    extensions = tree / "usr/lib" / PYTHON / "lib-dynload"
    for name in TRIMMED_EXTENSIONS:
        for path in extensions.glob(f"{name}.cpython-*.so"):
            path.unlink()


def _add_agent(tree: Path, python: Path) -> None:
    for target, source in _agent_files():
        path = tree / AGENT_ROOT / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    _compile(python, tree, AGENT_ROOT)
    init = tree / "usr/sbin/vmcell-init"
    init.write_text(INIT)
    init.chmod(0o755)


def _compile(python: Path, tree: Path, folder: str) -> None:
    """Byte code of `tree`/`folder` by the image's own interpreter, not checked against mtimes."""
    run_step(
        [
            python / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
            *("--library-path", python / "usr/lib/x86_64-linux-gnu"),
            *(python / "usr/bin" / PYTHON, "-S", "-B", "-m", "compileall", "-q"),
            *("--invalidation-mode", "unchecked-hash"),
            *("-s", tree, "-p", "/", tree / folder),
        ],
        environment={"PYTHONHOME": str(python / "usr"), "PYTHONHASHSEED": "0"},
        deadline_s=COMPILE_DEADLINE_S,
    )
