"""The templates that every node has, as images: built where they are not, imported into containerd.

`base` is what sandboxes start from that name no template; `code-interpreter-v1` is what E2B's code
interpreter clients name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmcell_tools import interpreter_image
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.image_import import CONTAINERD_SOCKET, import_archive
from vmcell_tools.oci_image import build_oci_image
from vmcell_tools.progress import Progress

TEMPLATES = ("base", interpreter_image.NAME)
# noded's; images in it are templates.
NAMESPACE = "vmcell"


def install_templates(
    names: Sequence[str], cache: BuildCache, progress: Progress, socket: Path = CONTAINERD_SOCKET
) -> list[str]:
    """Builds and imports what is missing; a line for each that was.

    Without a containerd the images are built all the same, and the line says what to do. Raises
    CallerError without root where one has to be built, HostError when that or the import fails.
    """
    done = []
    for name in names:
        progress.step(f"template {name}: looking for its image, building it if need be")
        image = build_oci_image(name, cache, progress)
        if not socket.is_socket():
            done.append(
                f"template {name}: {image.archive} is built and not imported, as containerd does"
                f" not run ({socket}); start it, then run: vmcell image import {name}"
            )
            continue
        if import_archive(image, (NAMESPACE,), progress, socket):
            done.append(f"template {name}: imported {image.reference}")
    return done
