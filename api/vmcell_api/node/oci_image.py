"""What an image's JSON says: which manifest fits, which layers, how its process wants to run.

Source: OCI image-spec 1.0 (image-index, manifest, config) and Docker's schema 2 twins of them,
which share the fields read here. Images are input from strangers: every field is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from vmcell_protos.errors import CallerError

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
# Shell commands that are run in every sandbox of the image.
START_LABEL, READY_LABEL = "io.vmcell.start", "io.vmcell.ready"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """`chain_id` names the committed snapshot of all layers; `environment` is the image's own.

    `start_command` and `ready_command` are the image's labels, "" where the image has none.
    """

    chain_id: str
    environment: tuple[str, ...] = ()
    working_directory: str = "/"
    start_command: str = ""
    ready_command: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageProcess:
    """What an image says of its process; "" where it says nothing."""

    environment: tuple[str, ...]
    user: str
    working_directory: str
    start_command: str
    ready_command: str


def chain_id(diff_ids: list[str]) -> str:
    """The chain id of layers, lowest first (OCI image-spec, config, "Layer ChainID")."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


def manifest_digest(index: bytes, image: str) -> str:
    """The digest of the manifest for linux/amd64 in an image index.

    Raises CallerError when there is none or the JSON is not an index.
    """
    for entry in _list(_table(index, image), "manifests", image):
        if not isinstance(entry, dict):
            continue
        platform = entry.get("platform") or {"os": "linux", "architecture": "amd64"}
        if not isinstance(platform, dict):
            continue
        if (platform.get("os"), platform.get("architecture")) == ("linux", "amd64"):
            return _digest(entry.get("digest"), image)
    raise CallerError(
        f"image {image} has no linux/amd64 variant; import one that has",
        code="failed_precondition",
    )


def config_digest(manifest: bytes, image: str) -> str:
    """The digest of the config blob that a manifest names; raises CallerError."""
    config = _table(manifest, image).get("config")
    return _digest(config.get("digest") if isinstance(config, dict) else None, image)


def parse_config(config: bytes, image: str) -> ImageConfig:
    """The part of an image config that a sandbox needs; raises CallerError."""
    diff_ids, process = config_table(config, image)
    return ImageConfig(
        chain_id=chain_id(diff_ids),
        environment=process.environment,
        working_directory=process.working_directory or "/",
        start_command=process.start_command,
        ready_command=process.ready_command,
    )


def config_table(config: bytes, image: str) -> tuple[list[str], ImageProcess]:
    """Diff ids, the lowest first, and the process of an image config; raises CallerError."""
    table = _table(config, image)
    rootfs = table.get("rootfs")
    diff_ids = _list(rootfs if isinstance(rootfs, dict) else {}, "diff_ids", image)
    if not diff_ids:
        raise _broken(image, "it has no layers")
    process = table.get("config") or {}
    if not isinstance(process, dict):
        raise _broken(image, "its config is not an object")
    environment = process.get("Env") or []
    if not isinstance(environment, list):
        raise _broken(image, "its Env is not a list")
    labels = process.get("Labels") or {}
    if not isinstance(labels, dict):
        raise _broken(image, "its Labels are not an object")
    user, directory = process.get("User") or "", process.get("WorkingDir") or ""
    return [_digest(diff_id, image) for diff_id in diff_ids], ImageProcess(
        environment=tuple(row for row in environment if isinstance(row, str) and "=" in row),
        user=user if isinstance(user, str) else "",
        working_directory=directory if isinstance(directory, str) else "",
        start_command=_label(labels, START_LABEL, image),
        ready_command=_label(labels, READY_LABEL, image),
    )


def layer_table(manifest: bytes, image: str, count: int) -> list[tuple[str, int, str]]:
    """(digest, size in bytes, media type) of the layers, the lowest first; raises CallerError."""
    layers = []
    for row in _list(_table(manifest, image), "layers", image):
        size = row.get("size") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not isinstance(size, int) or size < 0:
            raise _broken(image, "a layer has no size")
        layers.append((_digest(row.get("digest"), image), size, str(row.get("mediaType"))))
    if len(layers) != count:
        raise _broken(image, f"it has {len(layers)} layers and {count} diff ids")
    return layers


def _label(labels: dict[str, object], name: str, image: str) -> str:
    value = labels.get(name, "")
    if not isinstance(value, str) or "\0" in value:
        raise _broken(image, f"its label {name} is {value!r} and no shell command")
    return value


def _table(data: bytes, image: str) -> dict[str, object]:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(image, f"not JSON: {error}") from error
    if not isinstance(table, dict):
        raise _broken(image, "not a JSON object")
    return table


def _list(table: dict[str, object], key: str, image: str) -> list[object]:
    value = table.get(key)
    if not isinstance(value, list):
        raise _broken(image, f"it has no list {key!r}")
    return value


def _digest(value: object, image: str) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _broken(image, f"{value!r} is not a digest")
    return value


def _broken(image: str, why: str) -> CallerError:
    return CallerError(
        f"image {image} cannot be read: {why}; import it again", code="failed_precondition"
    )
