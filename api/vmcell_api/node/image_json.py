"""The JSON of an image that a build makes: config and manifest above those of another image.

Source: OCI image-spec 1.0, config.md and manifest.md. Pure: blobs go in and come out as bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from vmcell_api.node.blob_store import Blob
from vmcell_api.node.oci_image import config_table, layer_table

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, kw_only=True)
class ImageState:
    """An image as a build sees it; `environment`, `user` and `workdir` are its process defaults.

    `layers` are (diff id, blob), the lowest first. `user` "" and `workdir` "": not set.
    """

    layers: tuple[tuple[str, Blob], ...]
    environment: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""

    def with_layer(self, blob: Blob) -> ImageState:
        """The same image with one more layer, an uncompressed tar."""
        return replace(self, layers=(*self.layers, (blob.digest, blob)))

    def diff_ids(self) -> list[str]:
        """The digests of the unpacked layers, the lowest first."""
        return [diff_id for diff_id, _ in self.layers]


def read_state(manifest: bytes, config: bytes, image: str) -> ImageState:
    """The state that an image's own JSON describes; raises CallerError for broken JSON."""
    diff_ids, process = config_table(config, image)
    blobs = [
        Blob(digest=digest, size=size, media_type=media_type)
        for digest, size, media_type in layer_table(manifest, image, len(diff_ids))
    ]
    environment = dict(row.split("=", 1) for row in process.environment)
    return ImageState(
        layers=tuple(zip(diff_ids, blobs, strict=True)),
        environment=environment,
        user=process.user,
        workdir=process.working_directory,
    )


def write_config(state: ImageState, *, architecture: str = "amd64") -> bytes:
    """The config blob; the same state always gives the same bytes."""
    process: dict[str, object] = {
        "Env": [f"{name}={value}" for name, value in state.environment.items()]
    }
    if state.user:
        process["User"] = state.user
    if state.workdir:
        process["WorkingDir"] = state.workdir
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": process,
        "rootfs": {"type": "layers", "diff_ids": state.diff_ids()},
    }
    return json.dumps(config).encode()


def write_manifest(state: ImageState, config: Blob) -> bytes:
    """The manifest blob."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": config.descriptor(),
        "layers": [blob.descriptor() for _, blob in state.layers],
    }
    return json.dumps(manifest).encode()
