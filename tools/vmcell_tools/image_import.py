"""Built OCI images into containerd, by `ctr`: the same door that any other archive takes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.build_step import run_step
from vmcell_tools.oci_image import IMAGES, OciImage, find_oci_image
from vmcell_tools.progress import Progress

CONTAINERD_SOCKET = Path("/run/containerd/containerd.sock")
IMPORT_DEADLINE_S = 600
LIST_DEADLINE_S = 60


class ImageRow(NamedTuple):
    """One image we can build; `imported` is None when containerd does not answer."""

    name: str
    reference: str
    archive: str | None
    imported: tuple[str, ...] | None


def import_image(
    name: str, namespaces: Sequence[str], cache: BuildCache, progress: Progress
) -> str:
    """Import the built image into each namespace that has not the same already; its reference.

    Raises HostError when it is not built, when containerd is not there or refuses it.
    """
    image = find_oci_image(name, cache, progress)
    if image is None:
        raise HostError(f"image {name!r} is not built; run: vmcell image build {name}")
    import_archive(image, namespaces, progress)
    return image.reference


def import_archive(
    image: OciImage,
    namespaces: Sequence[str],
    progress: Progress,
    socket: Path = CONTAINERD_SOCKET,
) -> list[str]:
    """Like `import_image` for a finished archive; the namespaces that had not the same already."""
    if not socket.is_socket():
        raise HostError(f"containerd does not run here ({socket}); see: vmcell doctor")
    digest = archive_digest(image.archive)
    done = []
    for namespace in namespaces:
        if _digests(namespace, socket).get(image.reference) == digest:
            continue
        progress.step(f"importing {image.reference} into namespace {namespace}")
        run_step(
            [*_ctr(namespace, socket), "images", "import", image.archive],
            deadline_s=IMPORT_DEADLINE_S,
        )
        done.append(namespace)
    return done


def list_images(cache: BuildCache, progress: Progress) -> list[ImageRow]:
    """A row for each image of ours."""
    present = None
    # Without a socket ctr would wait ten seconds for one.
    if CONTAINERD_SOCKET.is_socket():
        namespaces = run_step(["ctr", "namespaces", "list", "-q"], deadline_s=LIST_DEADLINE_S)
        present = {namespace: _digests(namespace) for namespace in namespaces.split()}
    rows = []
    for name, settings in IMAGES.items():
        image = find_oci_image(name, cache, progress)
        imported = None
        if present is not None:
            imported = tuple(key for key, held in present.items() if settings.reference in held)
        archive = str(image.archive) if image else None
        rows.append(
            ImageRow(name=name, reference=settings.reference, archive=archive, imported=imported)
        )
    return rows


def archive_digest(archive: Path) -> str:
    """The digest that containerd will show: that of the one manifest (OCI image-layout.md)."""
    with tarfile.open(archive) as tar:
        index = tar.extractfile("index.json")
        if index is None:
            raise HostError(f"{archive} has no index.json; delete it and build the image again")
        (manifest,) = json.load(index)["manifests"]
    return str(manifest["digest"])


def _ctr(namespace: str, socket: Path) -> list[str]:
    return ["ctr", "--address", str(socket), "--namespace", namespace]


def _digests(namespace: str, socket: Path = CONTAINERD_SOCKET) -> dict[str, str]:
    """Reference → digest of the images of a namespace (columns 1 and 3 of `ctr images list`)."""
    shown = run_step([*_ctr(namespace, socket), "images", "list"], deadline_s=LIST_DEADLINE_S)
    rows = (line.split() for line in shown.splitlines()[1:])
    return {row[0]: row[2] for row in rows if len(row) > 2}
