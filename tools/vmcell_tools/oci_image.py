"""Our OCI images, without a registry: `oci-image/<digest>/image.tar`, one archive to import.

`base`  Debian with bash, Python, certificates and the user 1000: the image of sandboxes
`small` busybox: the image of tests and examples
`code-interpreter-v1` base with Node, scientific Python and E2B's code interpreter
`desktop` base with Xfce on a virtual screen and noVNC, for E2B's desktop clients
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import CallerError
from vmcell_tools import desktop_image, interpreter_image
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.debian_tree import (
    Package,
    closure_versions,
    named_versions,
    package_files,
)
from vmcell_tools.image_layers import (
    CUSTOMIZE,
    PATH_OPTIONS,
    busybox_layer,
    debian_layer,
    debian_sources,
)
from vmcell_tools.oci_layout import ImageSettings, write_archive
from vmcell_tools.progress import Progress
from vmcell_tools.python_wheels import wheels

KIND = "oci-image"
ARCHIVE_NAME = "image.tar"
IMAGES_KEPT = 6
# Raise it when the steps below change what comes out.
RECIPE = "2"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# usr-is-merged stands in for usrmerge, which would bring all of Perl.
DEBIAN_PACKAGES = ("usr-is-merged", "python3", "ca-certificates", "procps")
# What mmdebstrap takes for minbase: it decides nothing here, but its versions are in the digest.
MINIMAL_DEBIAN = ("?essential", "apt", "e2fsprogs", "mount", "tzdata")
BUSYBOX_PACKAGES = ("busybox-static",)

BASE = ImageSettings(
    reference="docker.io/vmcell/base:latest",
    environment={"PATH": PATH, "LANG": "C.UTF-8"},
    command=("/bin/bash",),
    directory="/",
    comment="Debian, minimal, with Python",
)
SMALL = ImageSettings(
    reference="docker.io/vmcell/small:latest",
    environment={"PATH": PATH},
    command=("/bin/sh",),
    directory="/",
    comment="busybox",
)
INTERPRETER = interpreter_image.settings(dict(BASE.environment))
DESKTOP = desktop_image.settings(dict(BASE.environment))
IMAGES = {
    "base": BASE,
    "small": SMALL,
    interpreter_image.NAME: INTERPRETER,
    desktop_image.NAME: DESKTOP,
}


@dataclass(frozen=True, kw_only=True)
class OciImage:
    """A finished archive and the name that importing it gives."""

    archive: Path
    reference: str


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What an image is made of: `digest` names it, `make` writes its layer."""

    digest: str
    make: Callable[[Path], None]


def find_oci_image(name: str, cache: BuildCache, progress: Progress) -> OciImage | None:
    """The image that `build_oci_image` would return at once, or None when it would build."""
    directory = cache.find(KIND, _plan(name, cache, progress).digest)
    return _opened(name, directory) if directory else None


def build_oci_image(name: str, cache: BuildCache, progress: Progress) -> OciImage:
    """The image `name` (a key of IMAGES) of today's packages, built when it is not cached.

    Raises CallerError for another name, and without root for any but "small"; HostError for a full
    disk.
    """
    plan = _plan(name, cache, progress)

    def fill(directory: Path) -> None:
        work = directory / "work"
        work.mkdir()
        plan.make(work / "layer.tar")
        progress.step(f"writing the archive of {IMAGES[name].reference}")
        write_archive(directory / ARCHIVE_NAME, work / "layer.tar", IMAGES[name])
        shutil.rmtree(work)

    directory = cache.build(KIND, plan.digest, fill, progress)
    cache.keep_newest(KIND, IMAGES_KEPT)
    return _opened(name, directory)


def _opened(name: str, directory: Path) -> OciImage:
    return OciImage(archive=directory / ARCHIVE_NAME, reference=IMAGES[name].reference)


def _plan(name: str, cache: BuildCache, progress: Progress) -> _Plan:
    if name not in IMAGES:
        raise CallerError(f"there is no image {name!r}; build one of {', '.join(IMAGES)}")
    if name == "small":
        return _small_plan(cache, progress)
    if name == interpreter_image.NAME:
        return _interpreter_plan(cache, progress)
    if name == desktop_image.NAME:
        return _desktop_plan(cache, progress)
    return _base_plan(cache, progress)


def _small_plan(cache: BuildCache, progress: Progress) -> _Plan:
    packages = named_versions(cache, BUSYBOX_PACKAGES, progress)

    def make(layer: Path) -> None:
        archives = package_files(cache, packages, progress)
        progress.step("laying out busybox")
        busybox_layer(layer, archives)

    return _Plan(digest=_digest(SMALL, packages), make=make)


def _base_plan(cache: BuildCache, progress: Progress) -> _Plan:
    sources = debian_sources()
    packages = closure_versions(cache, (*MINIMAL_DEBIAN, *DEBIAN_PACKAGES), progress)

    def make(layer: Path) -> None:
        progress.step(f"installing {len(packages)} Debian packages into an image; about a minute")
        debian_layer(layer, DEBIAN_PACKAGES, sources)

    return _Plan(digest=_digest(BASE, packages, sources, *PATH_OPTIONS, *CUSTOMIZE), make=make)


def _interpreter_plan(cache: BuildCache, progress: Progress) -> _Plan:
    sources = debian_sources()
    names = (*DEBIAN_PACKAGES, *interpreter_image.DEBIAN_PACKAGES)
    packages = closure_versions(cache, (*MINIMAL_DEBIAN, *names), progress)

    def make(layer: Path) -> None:
        fetched = wheels(interpreter_image.LOCK, cache, progress)
        progress.step(
            f"installing {len(packages)} Debian and {len(fetched)} Python packages into an image; "
            "about two minutes"
        )
        hooks = interpreter_image.hooks(layer.parent, fetched)
        debian_layer(layer, names, sources, hooks)

    more = (sources, *PATH_OPTIONS, *CUSTOMIZE, *interpreter_image.inputs())
    return _Plan(digest=_digest(INTERPRETER, packages, *more), make=make)


def _desktop_plan(cache: BuildCache, progress: Progress) -> _Plan:
    sources = debian_sources()
    names = (*DEBIAN_PACKAGES, *desktop_image.DEBIAN_PACKAGES)
    packages = closure_versions(cache, (*MINIMAL_DEBIAN, *names), progress)
    novnc = named_versions(cache, desktop_image.NOVNC_PACKAGES, progress)

    def make(layer: Path) -> None:
        (archive,) = package_files(cache, novnc, progress)
        progress.step(
            f"installing {len(packages)} Debian packages into an image, 700 MB; about three minutes"
        )
        hooks = desktop_image.hooks(archive)
        debian_layer(layer, names, sources, hooks, uncleaned=desktop_image.UNCLEANED)

    recipe = (*desktop_image.hooks(Path("novnc.deb")), *desktop_image.UNCLEANED)
    more = (sources, *PATH_OPTIONS, *CUSTOMIZE, *recipe)
    return _Plan(digest=_digest(DESKTOP, (*packages, *novnc), *more), make=make)


def _digest(settings: ImageSettings, packages: Sequence[Package], *more: str | bytes) -> str:
    return input_digest(RECIPE, repr(settings), *map(str, packages), *more)
