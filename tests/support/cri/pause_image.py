"""The small image with a command that does not end, for runc's pods.

runc runs the sandbox image of a pod; ours has a shell, which ends at once without an input.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

from vmcell_tools.oci_image import SMALL
from vmcell_tools.oci_layout import write_archive


def write_pause_image(small: Path, folder: Path) -> Path:
    """The archive of `small`'s layer, under its name, that sleeps."""
    layer = folder / "pause-layer.tar"
    with tarfile.open(small) as archive:
        (entry,) = _json(archive, "index.json")["manifests"]
        manifest = _json(archive, _blob(entry["digest"]))
        source = archive.extractfile(_blob(manifest["layers"][0]["digest"]))
        assert source is not None
        layer.write_bytes(source.read())
    path = folder / "pause.tar"
    write_archive(path, layer, replace(SMALL, command=("/bin/sleep", "1000000")))
    layer.unlink()
    return path


def _json(archive: tarfile.TarFile, name: str) -> dict[str, list[dict[str, str]]]:
    file = archive.extractfile(name)
    assert file is not None
    content: dict[str, list[dict[str, str]]] = json.load(file)
    return content


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
