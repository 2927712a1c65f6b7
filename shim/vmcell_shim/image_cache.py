"""EROFS images by the layers they were made from: built once for all containers of a host."""

from __future__ import annotations

import hashlib
import json
import os

from vmcell_protos.errors import HostError
from vmcell_shim.cache_collector import collect
from vmcell_shim.cached_image import (
    IMAGE,
    PARTIAL,
    cache_directory,
    digest_head,
    locked_directory,
    open_image,
    record_path,
)
from vmcell_shim.erofs import BUILD_TIMEOUT_S, merged_image
from vmcell_shim.file_lock import create_locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmcell_shim.cached_image import CachedImage, Chain
    from vmcell_shim.layers import Layer

# Changes when the way images are made changes, so that old ones are not taken for new ones.
_FORMAT = 2
# An image that was built may be removed before it is held, by somebody with a tight limit.
_BUILDS = 3
# A directory for builds to mount on, each in a namespace of its own.
_MOUNT_POINT = "mnt"


def chain_image(layers: Sequence[Layer], cache_dir: str, *, limit_mib: int) -> CachedImage:
    """The image of `layers` (topmost first), built if it is not there yet; the caller closes it.

    Several shims may ask at once: one builds, the others wait for it. After a build, images whose
    layers have gone are removed, and the least recently used ones over `limit_mib` that nobody
    uses. Raises HostError; a failed build leaves nothing behind.
    """
    chain = [layer.identity for layer in layers]
    key = hashlib.sha256(json.dumps([_FORMAT, chain]).encode()).hexdigest()
    directory = cache_directory(cache_dir)
    image = os.path.join(directory, key + IMAGE)
    try:
        builds = 0
        while builds < _BUILDS:
            found = open_image(image)
            if found is not None:
                return found
            os.makedirs(directory, mode=0o700, exist_ok=True)
            if _build(layers, chain, image):
                builds += 1
                found = open_image(image)
                _make_room(cache_dir, limit_mib, found)
                if found is not None:
                    return found
    except OSError as error:
        raise HostError(f"cannot build the image {image}: {error}") from error
    raise HostError(f"the image {image} goes as often as it is built; who removes it?")


def _make_room(cache_dir: str, limit_mib: int, held: CachedImage | None) -> None:
    try:
        collect(cache_dir, limit_mib=limit_mib)
    except BaseException:
        if held is not None:
            held.close()
        raise


def _build(layers: Sequence[Layer], chain: Chain, image: str) -> bool:
    """Builds the image unless somebody else is at it or has been; True when it built.

    After False there may be an image now.
    """
    directory = os.path.dirname(image)
    partial = image[: -len(IMAGE)] + PARTIAL
    fd = create_locked(partial, timeout_s=BUILD_TIMEOUT_S)
    if fd is None:
        return False
    try:
        with locked_directory(directory):
            if not _remove_unusable(image):
                os.unlink(partial)
                return False
        mount_point = os.path.join(directory, _MOUNT_POINT)
        os.makedirs(mount_point, exist_ok=True)
        merged_image(layers, partial, mount_point)
        _publish(chain, image, partial)
    finally:
        os.close(fd)
    return True


def _publish(chain: Chain, image: str, partial: str) -> None:
    """The record first: an image without one would be taken for damaged."""
    fd = os.open(partial, os.O_RDONLY)
    try:
        record = {
            "layers": chain,
            "length": os.fstat(fd).st_size,
            "head": digest_head(fd),
        }
    finally:
        os.close(fd)
    path = record_path(image)
    with locked_directory(os.path.dirname(image)):
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.rename(path + ".new", path)
        os.rename(partial, image)


def _remove_unusable(image: str) -> bool:
    """Removes the file at `image` if it is not what was built; True when none is there now."""
    found = open_image(image)
    if found is not None:
        found.close()
        return False
    if os.path.exists(image):
        os.unlink(image)
    return True
