"""Building EROFS images: of merged layers, of one directory.

The layers are merged by an overlay mount in a mount namespace of the building process alone:
whatever ends that process also ends the mounts. The image is uncompressed with no inlined file
tails (`-E noinline_data`: a file with an inlined tail is never DAX) and padded to 2 MiB.
"""

from __future__ import annotations

import os

from vmcell_protos.errors import HostError
from vmcell_shim.spawn import run_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmcell_shim.layers import Layer

ALIGN_BYTES = 2 << 20
BUILD_TIMEOUT_S = 1800
# mount(2) takes one page of options; the common parent keeps the names in it short. overlayfs takes
# 500 lower directories (fs/overlayfs, OVL_MAX_STACK).
_OPTIONS_LIMIT_BYTES = 4000
_LOWERS_LIMIT = 500

# Equal trees give equal images, to the byte: a guest that was saved goes on with an image that was
# built on another node. Files keep their times up to that of the build, which is the last there is.
_UUID = "76d63e11-6365-4c6c-8000-000000000001"
_MKFS = ["mkfs.erofs", "--quiet", "--preserve-mtime", f"-U{_UUID}", "-Enoinline_data"]
_BUILD_TIME = {"SOURCE_DATE_EPOCH": str((1 << 32) - 1)}
# $1 where directories are named from, $2 overlay options, $3 mount point, $4 topmost layer, then
# images up to "--", then mkfs and its options. mount(2), because the newer calls take 255 bytes of
# an option. The merged root is a directory of our own above all: a layer's was changed last when it
# was unpacked, whatever the layer says.
_MERGE = """cd "$1"; options=$2; place=$3; topmost=$4; shift 4
export LIBMOUNT_FORCE_MOUNT2=always
mount -t tmpfs -o mode=700 tmpfs "$place"
mkdir "$place/merged" "$place/root"
n=0
while [ "$1" != -- ]; do
  mkdir "$place/$n"; mount -t erofs -o ro,loop "$1" "$place/$n"; n=$((n+1)); shift
done
shift
chown --reference="$topmost" "$place/root"
chmod --reference="$topmost" "$place/root"
touch -d @0 "$place/root"
mount -t overlay -o "$options" overlay "$place/merged"
exec "$@" "$place/merged"
"""


def merged_image(layers: Sequence[Layer], image: str, mount_point: str) -> None:
    """Builds the image of `layers` (topmost first) at `image`, over what is there.

    `mount_point` is an empty directory; mounts of several builds on it do not see each other.
    Raises HostError; a failed build leaves no image.
    """
    directories = [layer.path for layer in layers if layer.superblock is None]
    images = [layer.path for layer in layers if layer.superblock is not None]
    common = os.path.commonpath([os.path.dirname(path) for path in directories] or ["/"])
    names = []
    for layer in layers:
        if layer.superblock is None:
            names.append(os.path.relpath(layer.path, common))
        else:
            names.append(f"{mount_point}/{images.index(layer.path)}")
    # With it one layer is an overlay too, so that whiteouts and overlay's own attributes vanish in
    # every case.
    options = _overlay_options([f"{mount_point}/root", *names])
    script = ["sh", "-ec", _MERGE, "sh", common, options, mount_point, names[0]]
    script += [*images, "--", *_MKFS, image]
    sources = f"{layers[0].path} and {len(layers) - 1} layers below it"
    _make_image(["unshare", "--mount", *script], image, sources)


def tree_image(source: str, image: str) -> None:
    """An image of one directory as it is now, for a root that is no chain. Raises HostError."""
    _make_image([*_MKFS, image, source], image, source)


def _overlay_options(names: list[str]) -> str:
    for name in names:
        if any(mark in name for mark in ",:\\"):
            raise HostError(
                f"layer {name} cannot be mounted: its path holds ',', ':' or a backslash"
            )
    options = "ro,lowerdir=" + ":".join(names)
    if len(names) > _LOWERS_LIMIT or len(os.fsencode(options)) > _OPTIONS_LIMIT_BYTES:
        raise HostError(
            f"the image has {len(names) - 1} layers, more than one overlay mount can name; "
            "use an image with fewer layers"
        )
    return options


def _make_image(command: list[str], image: str, source: str) -> None:
    try:
        try:
            environment = {**os.environ, **_BUILD_TIME}
            code, output = run_program(command, timeout_s=BUILD_TIMEOUT_S, env=environment)
        except FileNotFoundError as error:
            raise HostError(f"cannot run {command[0]}: {error}; install erofs-utils") from error
        if code:
            detail = output.splitlines()[-1] if output else "no message"
            raise HostError(
                f"cannot build the image of {source}: {command[0]} ended with {code}: {detail}; "
                f"{_free_space(image)}"
            )
        fd = os.open(image, os.O_RDWR)
        try:
            size = os.fstat(fd).st_size
            os.ftruncate(fd, -(-size // ALIGN_BYTES) * ALIGN_BYTES)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        if os.path.exists(image):
            os.unlink(image)
        raise


def _free_space(path: str) -> str:
    directory = os.path.dirname(path)
    status = os.statvfs(directory)
    return f"{status.f_bavail * status.f_frsize >> 20} MiB are free in {directory}"
