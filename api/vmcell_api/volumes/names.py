"""Ids and names of volumes, and where a sandbox may have them.

A volume id is "v" and 19 of a-z0-9, so it can be no sandbox's. Names are E2B's and cubesandbox's:
letters, digits, dash and underscore, at most 128.
"""

from __future__ import annotations

import itertools
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass

from vmcell_protos.errors import CallerError

VOLUME_ID = re.compile(r"v[a-z0-9]{19}")
MAX_MOUNTS = 16
MAX_MOUNT_PATH = 512
NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ALPHABET = string.ascii_lowercase + string.digits
# The kernel's own; nothing may be mounted on them or below.
_KERNEL_TREES = ("/proc", "/sys", "/dev")
# The root, and what noded and the agent put into every sandbox.
_TAKEN = ("/", "/etc", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf")


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """One volume in one sandbox: `path` is absolute and normal, `name` what the client knows."""

    volume_id: str
    name: str
    path: str


def new_volume_id() -> str:
    """A fresh id of 98 random bits."""
    return "v" + "".join(secrets.choice(_ALPHABET) for _ in range(19))


def check_volume_name(name: str) -> str:
    """The name; raises CallerError for one that no volume can have."""
    if not NAME.fullmatch(name):
        raise CallerError(
            f"{name[:60]!r} is no volume name; use 1 to 128 letters, digits, dashes and underscores"
        )
    return name


def mount_path(text: str) -> str:
    """`text` as a normal path (no trailing slash); raises CallerError where none may be mounted."""
    where = f"volumeMounts path {text[:80]!r}"
    if len(text) > MAX_MOUNT_PATH or not text.isprintable():
        raise CallerError(f"{where}: give up to {MAX_MOUNT_PATH} printable characters")
    if not text.startswith("/"):
        raise CallerError(f"{where} is not absolute; begin it with /")
    parts = [part for part in text.split("/") if part]
    if "." in parts or ".." in parts:
        raise CallerError(f"{where} has a . or .. in it; write the path plainly")
    path = "/" + "/".join(parts)
    inside = [tree for tree in _KERNEL_TREES if path == tree or path.startswith(f"{tree}/")]
    if path in _TAKEN or inside:
        raise CallerError(
            f"{where}: a volume cannot be mounted there; choose another, as /mnt/data"
        )
    return path


def check_mount_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """All mounts of one sandbox, normal; raises CallerError for too many, or one in another."""
    if len(paths) > MAX_MOUNTS:
        raise CallerError(f"volumeMounts has {len(paths)} rows; a sandbox has at most {MAX_MOUNTS}")
    normal = tuple(mount_path(path) for path in paths)
    # What begins with a text follows it directly in the order of texts.
    ordered = sorted(f"{path}/" for path in normal)
    for upper, lower in itertools.pairwise(ordered):
        if lower.startswith(upper):
            raise CallerError(
                f"volumeMounts has {upper.rstrip('/')!r} and {lower.rstrip('/')!r}; one lies on or "
                "in the other, choose paths apart"
            )
    return normal
