"""The mounts of Task.Create → the images and disks a VM gets as its container's root.

| snapshotter | mounts | the root in the guest |
|---|---|---|
| overlayfs | `overlay` | one image merged from the layers, cached |
| the same without a parent, native | `bind` | one image of the directory, its own |
| none (`ctr run --rootfs`) | none | one image of the directory, its own |
| devmapper, blockfile | `ext4` on a block device or file | that disk itself |
| erofs | `overlay` of mounted images; a list from 2.2 on | the layers' images as they are |

Only the mounts themselves are used, never what lies under a path of the guest's choosing
(CVE-2026-24054). Writes go to a disk, not to the host's directory.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.config import CACHE_LIMIT_MIB
from vmcell_shim.disk import copy_disk, writable_disk
from vmcell_shim.erofs import merged_image, tree_image
from vmcell_shim.image_cache import chain_image
from vmcell_shim.layers import Layer, find_layers
from vmcell_shim.mount_list import is_mount_list, overlay_options, read_mount_list
from vmcell_shim.sandbox_files import make_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.task import Mount
    from vmcell_shim.cached_image import CachedImage
    from vmcell_shim.saved_container import SavedRoot

DISK_NAME = "vmcell.ext4"
# File systems of the guest's kernel that may be a whole root (kernel/x86_64.config).
BLOCK_FILE_SYSTEMS = ("ext4",)
# A VMM has eight pmem devices at boot and the first is the base image.
MAX_LOWERS = 7
# Mount options that say nothing about what is in the root.
_BLOCK_OPTIONS = ("loop", "rw", "nouuid", "discard", "nodiscard", "noatime", "relatime", "nodev")


@dataclass(frozen=True, kw_only=True)
class RootSource:
    """Where a root comes from: layers (topmost first), one directory of its own, or a disk.

    `private`: the topmost layer is the container's own, so the image serves no other.
    `snapshot_dir` is the snapshot's own directory, "" when writes have no place in one; `disk` is
    the file for writes where the mounts name one, to be made with `disk_mib` unless that is 0.
    """

    layers: tuple[str, ...] = ()
    private: bool = False
    directory: str = ""
    block_device: str = ""
    snapshot_dir: str = ""
    disk: str = ""
    disk_mib: int = 0
    read_only: bool


@dataclass(frozen=True, kw_only=True)
class RootImages:
    """What the guest gets; the caller closes it when the container has gone.

    Either `lowers` (EROFS images, topmost first, each for a pmem window) with `disk` (ext4 for
    writes, "": the root is read-only), or `block_device` alone: an ext4 with the whole root, on a
    block device or in a file, to be opened for writing even where the root shall be read-only (the
    guest sees to that, and may have to replay the journal).
    `keeps_writes`: what the guest writes outlives the task, so the guest is shut down, not killed.
    `cached` holds an image of the cache.
    """

    lowers: tuple[str, ...] = ()
    disk: str = ""
    block_device: str = ""
    keeps_writes: bool = False
    cached: CachedImage | None = None

    @property
    def image(self) -> str:
        """The one image; raises CallerError when the root is not made of exactly one."""
        if len(self.lowers) != 1:
            raise CallerError(
                f"the root is {len(self.lowers)} images and the disk {self.block_device or 'none'}",
                code="unimplemented",
            )
        return self.lowers[0]

    def close(self) -> None:
        """Gives cached images free for removal. Idempotent."""
        if self.cached is not None:
            self.cached.close()


def parse_mounts(mounts: list[Mount], root_path: str, read_only: bool) -> RootSource:
    """The source named by the mounts, or by the spec's root.path when there are none.

    Raises CallerError for every form of mount that is not understood.
    """
    if not mounts:
        return _directory_source(root_path, read_only)
    if is_mount_list(mounts):
        return _list_source(mounts, read_only)
    mount = mounts[0]
    if mount.type == "overlay":
        return _overlay_source(mount, read_only)
    if mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options:
        return _directory_source(mount.source, read_only or "ro" in mount.options)
    if mount.type in BLOCK_FILE_SYSTEMS:
        return _block_source(mount, read_only)
    raise CallerError(
        f"the root is a mount of type {mount.type!r} from {mount.source!r}; known are "
        f"overlay, bind, erofs and {', '.join(BLOCK_FILE_SYSTEMS)}: use the overlayfs, erofs, "
        "native, blockfile or devmapper snapshotter (the latter two with fs_type ext4)",
        code="unimplemented",
    )


def _directory_source(path: str, read_only: bool) -> RootSource:
    if not path.startswith("/") or not os.path.isdir(path):
        raise CallerError(f"the root {path!r} is no absolute path of a directory")
    return RootSource(private=True, directory=path, read_only=read_only)


def _overlay_source(mount: Mount, read_only: bool) -> RootSource:
    options = overlay_options(mount)
    layers = tuple(path for path in options.get("lowerdir", "").split(":") if path)
    if not layers:
        raise CallerError("the root is an overlay without lowerdir; containerd names one")
    return _layers_source(layers, options.get("upperdir", ""), read_only)


def _layers_source(layers: tuple[str, ...], upper: str, read_only: bool) -> RootSource:
    for path in layers:
        if not path.startswith("/") or not os.path.exists(path):
            raise CallerError(f"layer {path!r} of the root is no absolute path of what is there")
    if upper and not os.path.isdir(upper):
        raise CallerError(f"upperdir {upper!r} of the root is no directory")
    # Files somebody put into the snapshot before the container was made belong to the root too.
    private = bool(upper and os.listdir(upper))
    return RootSource(
        layers=(upper, *layers) if private else layers,
        private=private,
        snapshot_dir=os.path.dirname(upper) if upper else "",
        read_only=read_only or not upper,
    )


def _list_source(mounts: list[Mount], read_only: bool) -> RootSource:
    row = read_mount_list(mounts)
    source = _layers_source(row.layers, row.upper, read_only)
    if not row.disk:
        return source
    return RootSource(
        layers=row.layers,
        snapshot_dir=os.path.dirname(row.disk),
        disk=row.disk,
        disk_mib=row.disk_mib,
        read_only=read_only,
    )


def _block_source(mount: Mount, read_only: bool) -> RootSource:
    for option in mount.options:
        if option not in _BLOCK_OPTIONS:
            raise CallerError(
                f"the root {mount.source} is to be mounted with {option!r}, which a guest cannot "
                "follow; give it a writable snapshot with default options",
                code="unimplemented",
            )
    try:
        kind = os.stat(mount.source).st_mode
    except OSError as error:
        raise CallerError(f"the root's disk {mount.source!r} cannot be found: {error}") from error
    if not mount.source.startswith("/") or not (stat.S_ISBLK(kind) or stat.S_ISREG(kind)):
        raise CallerError(f"the root's disk {mount.source!r} is neither a block device nor a file")
    return RootSource(private=True, block_device=mount.source, read_only=read_only)


def prepare_root(
    source: RootSource,
    *,
    cache_dir: str,
    own_dir: str,
    writable_mib: int,
    cache_limit_mib: int = CACHE_LIMIT_MIB,
    max_lowers: int = MAX_LOWERS,
    saved: SavedRoot | None = None,
) -> RootImages:
    """Makes what is missing. `own_dir` takes what belongs to this sandbox alone; the caller
    removes it. More than `max_lowers` images become one. With `saved` the images are the ones it
    knows, and the disk is a copy of its own, whatever it was before. Raises CallerError, HostError.
    """
    if source.block_device and saved is not None:
        raise CallerError(
            f"the root is the disk {source.block_device} itself, on which no snapshot can go on; "
            "use the overlayfs, erofs or native snapshotter",
            code="unimplemented",
        )
    if source.block_device:
        return RootImages(block_device=source.block_device, keeps_writes=True)
    lowers, cached = _lower_images(source, cache_dir, own_dir, cache_limit_mib, max_lowers)
    try:
        disk = "" if source.read_only else _disk_path(source, own_dir)
        disk_from = saved.disk_for(lowers, writable=bool(disk)) if saved is not None else ""
        if disk:
            _make_disk(source, disk, cache_dir, writable_mib, disk_from)
    except BaseException:
        if cached is not None:
            cached.close()
        raise
    keeps_writes = bool(disk and source.snapshot_dir)
    return RootImages(lowers=lowers, disk=disk, keeps_writes=keeps_writes, cached=cached)


def _lower_images(
    source: RootSource, cache_dir: str, own_dir: str, cache_limit_mib: int, max_lowers: int
) -> tuple[tuple[str, ...], CachedImage | None]:
    layers = find_layers(source.layers)
    if source.private:
        make_directory(own_dir)
        return (_own_image(source, layers, own_dir),), None
    if len(layers) <= max_lowers and all(map(_fits_the_guest, layers)):
        # containerd keeps them as long as the container's snapshot stands on them.
        return tuple(layer.path for layer in layers), None
    cached = chain_image(layers, cache_dir, limit_mib=cache_limit_mib)
    return (cached.path,), cached


def _fits_the_guest(layer: Layer) -> bool:
    return layer.superblock is not None and layer.superblock.plain


def _own_image(source: RootSource, layers: tuple[Layer, ...], own_dir: str) -> str:
    image = os.path.join(own_dir, "root.erofs")
    if layers:
        mount_point = os.path.join(own_dir, "mnt")
        os.makedirs(mount_point, exist_ok=True)
        merged_image(layers, image, mount_point)
    else:
        tree_image(source.directory, image)
    return image


def _disk_path(source: RootSource, own_dir: str) -> str:
    if source.disk:
        return source.disk
    if source.snapshot_dir:
        return os.path.join(source.snapshot_dir, DISK_NAME)
    make_directory(own_dir)
    return os.path.join(own_dir, DISK_NAME)


def _make_disk(
    source: RootSource, disk: str, cache_dir: str, writable_mib: int, disk_from: str
) -> None:
    if disk_from:
        try:
            limit_bytes = (source.disk_mib or writable_mib) << 20
            if source.disk and not source.disk_mib:
                limit_bytes = os.stat(disk).st_size
            _check_length(os.stat(disk_from).st_size, limit_bytes)
            copy_disk(disk_from, disk)
        except OSError as error:
            raise HostError(f"cannot copy a snapshot's disk to {disk}: {error}") from error
    elif source.disk and not source.disk_mib:
        if not os.path.isfile(disk):
            raise CallerError(f"the root's file for writes {disk!r} is not there")
    else:
        writable_disk(disk, source.disk_mib or writable_mib, cache_dir)


def _check_length(length_bytes: int, limit_bytes: int) -> None:
    """How much of the host's disk a guest may fill is no snapshot's to say. CallerError."""
    if length_bytes > limit_bytes:
        raise CallerError(
            f"the snapshot has a disk of {length_bytes} bytes and the container may have "
            f"{limit_bytes}; make writable_mib larger where it is to go on",
            code="failed_precondition",
        )
