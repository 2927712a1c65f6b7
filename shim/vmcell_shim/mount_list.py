"""A root as a list of mounts that build on each other, as containerd hands it over from 2.2 on.

The pieces come first: EROFS layers, topmost first, and with a quota an ext4 file for writes. The
last mount joins them, naming the pieces by number: `lowerdir={{ overlay 1 3 }}`. What containerd's
mount manager would do (format, mkdir, mkfs) is done in the guest or by `prepare_root`; nothing is
mounted here. Source: containerd docs/mounts.md, plugins/snapshots/erofs, as of 2.2 to 2.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.task import Mount

# What the shim claims to handle, for the annotation of -info (containerd 2.2 and 2.3).
HANDLED_TRANSFORMS = ("format", "mkdir", "mkfs")
HANDLED_TYPES = ("erofs",)

_PRIVATE = "X-containerd."
_MKFS, _MKDIR = _PRIVATE + "mkfs.", _PRIVATE + "mkdir."
_CALL = re.compile(r"\{\{-?\s*(mount|overlay)\s+(\d{1,4})(?:\s+(\d{1,4}))?\s*-?\}\}")
_SIZE = re.compile(r"(\d{1,15})([KMGT]?)(?:I?B)?")
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_MAX_DISK_MIB = 16 << 20


@dataclass(frozen=True, kw_only=True)
class MountList:
    """`layers` topmost first; `upper` a directory of the host or "".

    `disk` is the ext4 file for writes or "", made with `disk_mib` where it is missing (0: it is
    there already). Read-only when it has neither.
    """

    layers: tuple[str, ...]
    upper: str = ""
    disk: str = ""
    disk_mib: int = 0


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What one mount before the last contributes: layers, or the file for writes."""

    layers: tuple[str, ...] = ()
    disk: str = ""
    disk_mib: int = 0


def is_mount_list(mounts: list[Mount]) -> bool:
    """Whether `read_mount_list` is meant for these mounts."""
    return len(mounts) > 1 or (len(mounts) == 1 and mounts[0].type == "erofs")


def read_mount_list(mounts: list[Mount]) -> MountList:
    """What the list means; raises CallerError naming the first mount that is not understood."""
    if len(mounts) == 1:
        return MountList(layers=_piece(mounts[0]).layers)
    pieces = [_piece(mount) for mount in mounts[:-1]]
    last = mounts[-1]
    kind = _base_type(last)
    if kind == "overlay":
        return _overlay(last, pieces)
    if kind == "bind" and "ro" in last.options:
        return MountList(layers=_lowers(last.source, pieces, last))
    raise _unknown(last, "a list of mounts ends with an overlay of them or a read-only bind")


def overlay_options(mount: Mount) -> dict[str, str]:
    """The options of an overlay by name; raises CallerError for those that change what the layers
    mean and cannot be followed."""
    options = dict(option.partition("=")[::2] for option in mount.options)
    for name in ("userxattr", "uidmap", "gidmap"):
        if name in options:
            raise CallerError(
                f"the root is an overlay with the option {name}; vmcell needs layers of the host's "
                "own user ids, so run containerd as root and without remapped snapshots",
                code="unimplemented",
            )
    return options


def _base_type(mount: Mount) -> str:
    """The type without the transforms before it, all of which must be known."""
    *transforms, kind = mount.type.split("/")
    if any(name not in HANDLED_TRANSFORMS for name in transforms):
        raise _unknown(mount, f"known are {', '.join(HANDLED_TRANSFORMS)} before a type")
    return kind


def _piece(mount: Mount) -> _Piece:
    kind = _base_type(mount)
    if "{{" in mount.source or not mount.source.startswith("/"):
        raise _unknown(mount, "its source must be an absolute path")
    if kind == "erofs":
        return _Piece(layers=_erofs_layers(mount))
    if kind == "ext4":
        if "ro" in mount.options:
            raise _unknown(mount, "the file for writes must not be read-only")
        return _Piece(disk=mount.source, disk_mib=_disk_mib(mount))
    raise _unknown(mount, "a root is made of EROFS layers and one ext4 file")


def _erofs_layers(mount: Mount) -> tuple[str, ...]:
    """The image itself; or what it is an index of (`device=`, lowest first), topmost first: each of
    those is a whole layer (mkfs.erofs, "rebuild" mode)."""
    devices = []
    for option in mount.options:
        name, _, value = option.partition("=")
        if option.startswith(_PRIVATE):
            raise _unknown(mount, f"option {option!r} asks for what the guest does not check")
        if name == "device":
            if not value.startswith("/"):
                raise _unknown(mount, f"option {option!r} names no absolute path")
            devices.append(value)
    return tuple(reversed(devices)) or (mount.source,)


def _disk_mib(mount: Mount) -> int:
    """The size to make the file with, 0 when somebody has made it."""
    if "mkfs" not in mount.type.split("/"):
        return 0
    size_bytes = 0
    for option in mount.options:
        if not option.startswith(_MKFS):
            continue
        name, _, value = option[len(_MKFS) :].partition("=")
        if name == "size":
            size_bytes = _size_bytes(mount, value)
        elif (name, value) != ("fs", "ext4"):
            raise _unknown(mount, f"option {option!r} is not understood")
    size_mib = -(-size_bytes // (1 << 20))
    if not 0 < size_mib <= _MAX_DISK_MIB:
        raise _unknown(mount, f"it needs {_MKFS}size, up to {_MAX_DISK_MIB >> 20} TiB")
    return size_mib


def _size_bytes(mount: Mount, text: str) -> int:
    match = _SIZE.fullmatch(text.upper())
    if match is None:
        raise _unknown(mount, f"{_MKFS}size is {text!r}; it takes bytes, or a number with a unit")
    return int(match[1]) << _UNITS[match[2]]


def _overlay(mount: Mount, pieces: list[_Piece]) -> MountList:
    for option in mount.options:
        if option.startswith(_PRIVATE) and not option.startswith(_MKDIR):
            raise _unknown(mount, f"option {option!r} is not understood")
    options = overlay_options(mount)
    layers = _lowers(options.get("lowerdir", ""), pieces, mount)
    upper = options.get("upperdir", "")
    if not upper or (upper.startswith("/") and "{{" not in upper):
        return MountList(layers=layers, upper=upper)
    call = _CALL.match(upper)
    piece = _named(call, pieces, mount)[0] if call else None
    # The guest's agent has its upper layer under this very name, so a commit finds it there.
    if call is None or piece is None or not piece.disk or upper[call.end() :] != "/upper":
        raise _unknown(mount, f"upperdir {upper!r} is no directory `upper` of the file for writes")
    return MountList(layers=layers, disk=piece.disk, disk_mib=piece.disk_mib)


def _lowers(text: str, pieces: list[_Piece], mount: Mount) -> tuple[str, ...]:
    """The layers that a lowerdir or a source names, directories among them."""
    layers: list[str] = []
    for part in text.split(":"):
        call = _CALL.fullmatch(part.strip())
        if call is not None:
            named = _named(call, pieces, mount)
            if any(not piece.layers for piece in named):
                raise _unknown(mount, f"{part!r} names the file for writes as a layer")
            layers += [layer for piece in named for layer in piece.layers]
        elif part.startswith("/") and "{{" not in part:
            layers.append(part)
        else:
            raise _unknown(mount, f"{part!r} names neither earlier mounts nor an absolute path")
    return tuple(layers)


def _named(call: re.Match[str], pieces: list[_Piece], mount: Mount) -> list[_Piece]:
    """The pieces of `mount N` or `overlay FIRST LAST`, in either direction."""
    first = int(call[2])
    last = first if call[3] is None else int(call[3])
    if (call[1] == "overlay") != (call[3] is not None) or max(first, last) >= len(pieces):
        raise _unknown(mount, f"{call[0]!r} does not name mounts before it")
    step = 1 if first <= last else -1
    return [pieces[index] for index in range(first, last + step, step)]


def _unknown(mount: Mount, why: str) -> CallerError:
    return CallerError(
        f"the root has a mount of type {mount.type!r} from {mount.source!r}: {why}",
        code="unimplemented",
    )
