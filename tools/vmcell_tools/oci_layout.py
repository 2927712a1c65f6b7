"""OCI archives: one image of one layer as a tar that `ctr image import` and others read.

Formats: OCI image spec 1.0.2, image-layout.md, manifest.md, config.md. The layer is a plain tar:
bigger in the cache, but nothing has to be inflated where it is unpacked. No time and no name of the
machine goes in, so the same layer and settings give the same digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LAYOUT_VERSION = "1.0.0"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
PLATFORM = {"architecture": "amd64", "os": "linux"}
CREATED = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What a container of the image starts with; `reference` names it ("docker.io/a/b:latest").

    `labels` are the image's own; noded reads those that begin with `io.vmcell.`.
    """

    reference: str
    environment: Mapping[str, str]
    command: tuple[str, ...]
    directory: str
    comment: str
    # No part of the repr, which names builds: images without labels keep their names.
    labels: Mapping[str, str] = field(default_factory=dict, repr=False)


def write_archive(archive: Path, layer: Path, settings: ImageSettings) -> str:
    """Write the archive of the image with the plain tar `layer`; returns the manifest's digest."""
    with layer.open("rb") as file:
        layer_digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    config = _json(_config(settings, layer_digest))
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _descriptor(CONFIG_TYPE, config),
            "layers": [
                {
                    "mediaType": LAYER_TYPE,
                    "digest": layer_digest,
                    "size": layer.stat().st_size,
                }
            ],
        }
    )
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": LAYOUT_VERSION}))
        _add(tar, "index.json", _json(_index(manifest, settings.reference)))
        for blob in (config, manifest):
            _add(tar, _blob_path(_digest(blob)), blob)
        entry = _entry(_blob_path(layer_digest), layer.stat().st_size)
        with layer.open("rb") as file:
            tar.addfile(entry, file)
    return _digest(manifest)


def _config(settings: ImageSettings, layer_digest: str) -> dict[str, object]:
    return {
        "created": CREATED,
        **PLATFORM,
        "config": {
            "Env": [f"{name}={value}" for name, value in settings.environment.items()],
            "Cmd": list(settings.command),
            "WorkingDir": settings.directory,
            **({"Labels": dict(settings.labels)} if settings.labels else {}),
        },
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        "history": [{"created": CREATED, "created_by": "vmcell", "comment": settings.comment}],
    }


def _index(manifest: bytes, reference: str) -> dict[str, object]:
    """containerd takes the full name from its own annotation, others the tag from the spec's."""
    annotations = {
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
    }
    described = _descriptor(MANIFEST_TYPE, manifest)
    return {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [{**described, "platform": PLATFORM, "annotations": annotations}],
    }


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    entry.mode = 0o644
    return entry


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(_entry(name, len(content)), io.BytesIO(content))
