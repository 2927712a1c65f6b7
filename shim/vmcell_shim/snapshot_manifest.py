"""What a snapshot is of, as `manifest.json` says it; no I/O.

It holds what the host must bring along to go on with it, with the digests of what must be the same,
and the digest of each of the snapshot's own files. It is input like the rest of the directory:
policy (network, limits, who may use it) never comes from here.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
FORMAT = 1
READABLE = (1,)
MANIFEST, STATE, MEMORY, DISK = "manifest.json", "state.json", "memory", "disk"
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """One file of a snapshot: its length, what it takes on the disk, and its content's digest."""

    bytes: int
    allocated_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`container_id` is the name by which the guest's agent knows the container, `macs` are its
    interfaces' addresses, `images` the digests of its root's images, topmost first. `disk`: it has
    one for writes. `parent` is the id of the snapshot it was made upon, "" for none."""

    created_unix_ns: int
    container_id: str
    vcpus: int
    memory_mib: int
    kernel: str
    base_image: str
    images: tuple[str, ...]
    disk: bool
    macs: tuple[str, ...]
    terminal: bool
    parent: str
    files: dict[str, SavedFile]


def file_names(*, disk: bool) -> tuple[str, ...]:
    """The files beside the manifest of a snapshot with or without a disk for writes."""
    return (STATE, MEMORY, DISK) if disk else (STATE, MEMORY)


def check_id(snapshot_id: str) -> None:
    """CallerError unless it is a snapshot's id."""
    if not ID.fullmatch(snapshot_id):
        raise CallerError(
            f"{snapshot_id[:80]!r} is no snapshot's id; it takes lower-case letters, digits and "
            "hyphens, 64 at most"
        )


def render(manifest: Manifest) -> bytes:
    """The document that `parse` reads: one for each manifest, to the byte, with its own digest."""
    tree = {"format": FORMAT, **asdict(manifest)}
    digest = hashlib.blake2b(json.dumps(tree).encode(), digest_size=32).hexdigest()
    return json.dumps({**tree, "digest": f"blake2b:{digest}"}, indent=1).encode() + b"\n"


def parse(document: bytes, name: str) -> Manifest:
    """CallerError: data_loss for what is no manifest, failed_precondition for another format.

    `name` is what the sentence calls the snapshot.
    """
    try:
        if len(document) > _LIMIT_BYTES:
            raise ValueError("it is too long")
        tree = json.loads(document)
        version = tree.pop("format")
        if type(version) is not int:
            raise ValueError("its format is no number")
        if version not in READABLE:
            raise CallerError(
                f"{MANIFEST} of snapshot {name} has format {version}; this version of vmcell reads "
                f"{', '.join(map(str, READABLE))}: make it again with this one",
                code="failed_precondition",
            )
        del tree["digest"]
        manifest = _manifest(tree)
        if render(manifest) != document:
            raise ValueError("it is not what was written")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CallerError(
            f"{MANIFEST} of snapshot {name} is damaged: {error}; delete the snapshot",
            code="data_loss",
        ) from error


def _manifest(tree: dict[str, Any]) -> Manifest:
    files = {
        file_name: SavedFile(
            bytes=_number(row["bytes"]),
            allocated_bytes=_number(row["allocated_bytes"]),
            digest=_text(row["digest"]),
        )
        for file_name, row in tree.pop("files").items()
    }
    manifest = Manifest(
        created_unix_ns=_number(tree.pop("created_unix_ns")),
        container_id=_text(tree.pop("container_id")),
        vcpus=_number(tree.pop("vcpus")),
        memory_mib=_number(tree.pop("memory_mib")),
        kernel=_text(tree.pop("kernel")),
        base_image=_text(tree.pop("base_image")),
        images=_texts(tree.pop("images")),
        disk=_flag(tree.pop("disk")),
        macs=_texts(tree.pop("macs")),
        terminal=_flag(tree.pop("terminal")),
        parent=_text(tree.pop("parent")),
        files=files,
    )
    if tree:
        raise ValueError(f"it has the unknown key {min(tree)!r}")
    wanted = file_names(disk=manifest.disk)
    if set(files) != set(wanted):
        raise ValueError(f"it names the files {sorted(files)}, not {sorted(wanted)}")
    if files[MEMORY].bytes != manifest.memory_mib << 20:
        raise ValueError("its memory has not the length it says")
    return manifest


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:40]!r} is not the number it should be")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError(f"{str(value)[:40]!r} is not the text it should be")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError("a list of it is none, or too long")
    return tuple(_text(item) for item in value)
