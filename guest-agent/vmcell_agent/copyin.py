"""Files the host hands in before the container's program starts (resolv.conf, hosts, secrets).

Runs inside the container's root (see containerfs), so no symlink leads out of it. A symlink of the
image that leads into proc or sysfs is refused: writing there would act on the kernel instead of
leaving a file.
"""

from __future__ import annotations

import os

from vmcell_agent import abi, containerfs, syscalls
from vmcell_agent.attempt import attempt
from vmcell_agent.ociprocess import MAX_ID
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import FileCopy

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 1024
_FILESYSTEMS = frozenset((abi.TMPFS_MAGIC, abi.OVERLAYFS_SUPER_MAGIC, abi.EXT4_SUPER_MAGIC))


def check(files: list[FileCopy]) -> None:
    """Refuse what cannot be copied in; raises CallerError."""
    if len(files) > MAX_FILES:
        raise CallerError(f"{len(files)} files to copy in; at most {MAX_FILES}")
    for file in files:
        if not file.destination.startswith("/") or "\0" in file.destination:
            raise CallerError(f"file destination {file.destination!r} must be absolute")
        if len(file.content) > MAX_FILE_BYTES:
            raise CallerError(
                f"{file.destination} has {len(file.content)} bytes; at most {MAX_FILE_BYTES}"
            )
        if max(file.uid, file.gid) > MAX_ID:
            raise CallerError(f"{file.destination} has owner {file.uid}:{file.gid}; too large")
        if file.mode > 0o7777:
            raise CallerError(f"{file.destination} has mode {file.mode:o}; it must be 0 to 7777")


def copy_in(files: list[FileCopy]) -> list[str]:
    """Write them in order, inside the container's root, then make read-only what is to be; returns
    where each of them is, with no symlink on the way."""
    targets = []
    for file in files:
        with attempt(f"copy {file.destination} into the container"):
            targets.append(_make_directory(file) if file.directory else _write(file))
    read_only = (target for file, target in zip(files, targets, strict=True) if file.read_only)
    for target in dict.fromkeys(read_only):
        with attempt(f"make {target} read-only in the container"):
            containerfs.bind_read_only(target)
    return targets


def refuse_kernel_files(path: str, target: int | str) -> None:
    """Raise CallerError unless `target` (a path or a descriptor) lies on a file system that keeps
    files; `path` is for the error."""
    if syscalls.filesystem_magic(target) not in _FILESYSTEMS:
        raise CallerError(f"{path} lies on a file system of the kernel's; nothing is copied there")


def _make_directory(file: FileCopy) -> str:
    target = containerfs.make_directory(file.destination)
    refuse_kernel_files(file.destination, target)
    os.chown(target, file.uid, file.gid)
    os.chmod(target, file.mode)
    return target


def _write(file: FileCopy) -> str:
    target = containerfs.settle(file.destination)
    refuse_kernel_files(file.destination, os.path.dirname(target))
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(target, flags, 0o600)
    try:
        refuse_kernel_files(file.destination, fd)
        os.ftruncate(fd, 0)
        fill(fd, file)
    finally:
        os.close(fd)
    return target


def fill(fd: int, file: FileCopy) -> None:
    """Content, owner and mode of an empty file."""
    written = 0
    while written < len(file.content):
        written += os.write(fd, file.content[written:])
    os.fchown(fd, file.uid, file.gid)
    os.fchmod(fd, file.mode)
