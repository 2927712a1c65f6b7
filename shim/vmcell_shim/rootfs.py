"""The mounts of Task.Create → the image and the disk a VM gets as its container's root.

Known are the active snapshots of containerd's overlayfs snapshotter (`overlay`, or `bind` when the
snapshot has no parent) and native snapshotter (`bind`), and a plain directory (`ctr run --rootfs`,
no mounts). Only the mount itself is used, never what lies under a path of the guest's choosing
(CVE-2026-24054). Writes go to the disk, not to the host's directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmcell_protos.errors import CallerError
from vmcell_protos.task import Mount
from vmcell_shim.disk import writable_disk
from vmcell_shim.erofs import chain_image, merged_image, tree_image
from vmcell_shim.sandbox_files import make_directory

DISK_NAME = "vmcell.ext4"


@dataclass(frozen=True, kw_only=True)
class RootSource:
    """Where a root comes from: a chain of layers (topmost first), or one directory of its own.

    `private`: the topmost layer is the container's own, so the image serves no other.
    `snapshot_dir` is the snapshot's own directory, "" when writes have no place in one.
    """

    layers: tuple[str, ...]
    private: bool
    directory: str
    snapshot_dir: str
    read_only: bool


@dataclass(frozen=True, kw_only=True)
class RootImages:
    """What becomes devices of the guest: EROFS `lowers`, topmost first, and the ext4 `disk` for
    writes above them ("" for a read-only root); or one `block_device` that is the whole root."""

    lowers: tuple[str, ...]
    disk: str = ""
    block_device: str = ""


def parse_mounts(mounts: list[Mount], root_path: str, read_only: bool) -> RootSource:
    """The source named by the mounts, or by the spec's root.path when there are none.

    Raises CallerError for every form of mount that is not understood.
    """
    if len(mounts) > 1:
        kinds = ", ".join(mount.type for mount in mounts)
        raise CallerError(
            f"the root is {len(mounts)} mounts ({kinds}); use the overlayfs or native snapshotter",
            code="unimplemented",
        )
    if not mounts:
        return _directory_source(root_path, read_only)
    mount = mounts[0]
    if mount.type == "overlay":
        return _overlay_source(mount, read_only)
    if mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options:
        return _directory_source(mount.source, read_only or "ro" in mount.options)
    raise CallerError(
        f"the root is a mount of type {mount.type!r} from {mount.source!r}; "
        "use the overlayfs or native snapshotter",
        code="unimplemented",
    )


def _directory_source(path: str, read_only: bool) -> RootSource:
    if not path.startswith("/") or not os.path.isdir(path):
        raise CallerError(f"the root {path!r} is no absolute path of a directory")
    return RootSource(layers=(), private=True, directory=path, snapshot_dir="", read_only=read_only)


def _overlay_source(mount: Mount, read_only: bool) -> RootSource:
    options = dict(option.partition("=")[::2] for option in mount.options)
    layers = tuple(path for path in options.get("lowerdir", "").split(":") if path)
    for path in layers:
        if not path.startswith("/") or not os.path.isdir(path):
            raise CallerError(f"lowerdir {path!r} of the root is no absolute path of a directory")
    if not layers:
        raise CallerError("the root is an overlay without lowerdir; containerd names one")
    upper = options.get("upperdir", "")
    if upper and not os.path.isdir(upper):
        raise CallerError(f"upperdir {upper!r} of the root is no directory")
    # Files somebody put into the snapshot before the container was made belong to the root too.
    private = bool(upper and os.listdir(upper))
    return RootSource(
        layers=(upper, *layers) if private else layers,
        private=private,
        directory="",
        snapshot_dir=os.path.dirname(upper) if upper else "",
        read_only=read_only or not upper,
    )


def prepare_root(
    source: RootSource, *, cache_dir: str, own_dir: str, writable_mib: int
) -> RootImages:
    """Makes what is missing. `own_dir` takes what belongs to this sandbox alone; the caller
    removes it. Raises HostError."""
    if source.layers and not source.private:
        image = chain_image(list(source.layers), cache_dir)
    else:
        make_directory(own_dir)
        image = os.path.join(own_dir, "root.erofs")
        if source.layers:
            merged_image(list(source.layers), image)
        else:
            tree_image(source.directory, image)
    if source.read_only:
        return RootImages(lowers=(image,))
    if source.snapshot_dir:
        disk = os.path.join(source.snapshot_dir, DISK_NAME)
    else:
        make_directory(own_dir)
        disk = os.path.join(own_dir, DISK_NAME)
    writable_disk(disk, writable_mib, cache_dir)
    return RootImages(lowers=(image,), disk=disk)
