"""Files of the host's that have changed, written again into a running container.

`plan` decides in the agent, `write` works in a child (see errand) that enters the container's mount
namespace. Where CreateContainer put a file is remembered without symlinks, and no symlink is
followed on the way there: a user of the container may have made one since.

A new file takes the old one's place by rename(2), so a reader sees the one or the other. Read-only
mounts do not hinder it: it is done in a copy of the container's mount namespace in which every
mount is writable. A single file that was made read-only is a mount itself and cannot be renamed
over; there the new file is mounted beneath the old one, which is then taken off.
"""

from __future__ import annotations

import os
from contextlib import suppress

from vmcell_agent import abi, copyin, syscalls
from vmcell_agent.attempt import attempt
from vmcell_agent.record import Record
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import FileCopy

_TEMPORARY = ".vmcell-copy"
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Renewal(Record):
    """One file to write, and where."""

    file: FileCopy
    target: str
    is_mount: bool


def plan(copies: list[FileCopy], targets: dict[str, str], files: list[FileCopy]) -> list[Renewal]:
    """Where each of `files` goes; raises CallerError for one that is neither among `copies` nor
    below a directory of them. `targets` says where a copy is when that is not its destination. What
    was made read-only stays so, whatever the file says."""
    known = {copy.destination: copy for copy in copies}
    return [_place(known, targets, file) for file in files]


def _place(known: dict[str, FileCopy], targets: dict[str, str], file: FileCopy) -> Renewal:
    destination = file.destination
    copy = known.get(destination)
    if copy is not None:
        if copy.directory != file.directory and not file.remove:
            kind = "directory" if copy.directory else "file"
            raise CallerError(f"{destination} was copied in as a {kind} and stays one")
        is_mount = copy.read_only and not copy.directory
        if is_mount and file.remove:
            raise CallerError(f"{destination} is a mount of its own and stays")
        return Renewal(file, targets.get(destination, destination), is_mount)
    parts = destination.split("/")
    if not any(part in ("", ".", "..") for part in parts[1:]):
        for end in range(len(parts) - 1, 0, -1):
            above = "/".join(parts[:end])
            if above in known and known[above].directory:
                target = "/".join((targets.get(above, above), *parts[end:]))
                return Renewal(file, target, is_mount=False)
    raise CallerError(
        f"{destination} is no file that was copied into the container, nor below such a directory"
    )


def merge(files: list[FileCopy], changed: list[FileCopy]) -> list[FileCopy]:
    """`files` with those of `changed` (which `plan` has accepted) in their place or added."""
    merged = {file.destination: file for file in files}
    for file in changed:
        if file.remove:
            merged.pop(file.destination, None)
            continue
        old = merged.get(file.destination)
        file.read_only = old is not None and old.read_only
        merged[file.destination] = file
    return list(merged.values())


def write(namespace: int, renewals: list[Renewal]) -> bytes:
    """Do it, in a child of the agent's; `namespace` is a descriptor of the mount namespace."""
    _enter_writable_copy(namespace)
    for renewal in renewals:
        if not renewal.is_mount:
            with attempt(f"copy {renewal.file.destination} into the container again"):
                _replace(renewal)
    for number, renewal in enumerate(row for row in renewals if row.is_mount):
        if number:
            _enter_writable_copy(namespace)
        with attempt(f"copy {renewal.file.destination} into the container again"):
            _replace_mount(namespace, renewal)
    return b""


def _enter_writable_copy(namespace: int) -> None:
    with attempt("enter the container's mount namespace"):
        syscalls.setns(namespace, abi.CLONE_NEWNS)
        syscalls.unshare(abi.CLONE_NEWNS)
        syscalls.make_all_writable_and_private()


def _open_parent(target: str) -> tuple[int, str]:
    """The directory `target` lies in, made when missing, and the name there."""
    *parents, name = target.strip("/").split("/")
    directory = os.open("/", _DIRECTORY)
    for part in parents:
        above = directory
        try:
            try:
                directory = os.open(part, _DIRECTORY, dir_fd=above)
            except FileNotFoundError:
                copyin.refuse_kernel_files(target, above)
                os.mkdir(part, 0o755, dir_fd=above)
                directory = os.open(part, _DIRECTORY, dir_fd=above)
        finally:
            os.close(above)
    copyin.refuse_kernel_files(target, directory)
    return directory, name


def _write_beside(directory: int, file: FileCopy) -> None:
    """The file, complete, under a name of our own in `directory`."""
    with suppress(FileNotFoundError):
        os.unlink(_TEMPORARY, dir_fd=directory)  # of a child that was killed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(_TEMPORARY, flags, 0o600, dir_fd=directory)
    try:
        copyin.fill(fd, file)
    except OSError:
        os.unlink(_TEMPORARY, dir_fd=directory)
        raise
    finally:
        os.close(fd)


def _replace(renewal: Renewal) -> None:
    directory, name = _open_parent(renewal.target)
    try:
        if renewal.file.remove:
            _remove(directory, name)
            return
        if renewal.file.directory:
            _renew_directory(directory, name, renewal.file)
            return
        _write_beside(directory, renewal.file)
        try:
            os.rename(_TEMPORARY, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(_TEMPORARY, dir_fd=directory)
            raise
    finally:
        os.close(directory)


def _remove(parent: int, name: str) -> None:
    """A file, a link or an empty directory; what has gone already is as wanted."""
    with suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=parent)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=parent)


def _renew_directory(parent: int, name: str, file: FileCopy) -> None:
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        copyin.refuse_kernel_files(file.destination, fd)
        os.fchown(fd, file.uid, file.gid)
        os.fchmod(fd, file.mode)
    finally:
        os.close(fd)


def _replace_mount(namespace: int, renewal: Renewal) -> None:
    directory, _ = _open_parent(renewal.target)
    _write_beside(directory, renewal.file)
    try:
        tree = syscalls.clone_tree(_TEMPORARY, directory)
        syscalls.set_tree_read_only(tree)
        syscalls.setns(namespace, abi.CLONE_NEWNS)  # from the copy into the container's own
        inside, name = _open_parent(renewal.target)
        os.fchdir(inside)
        os.close(inside)
        syscalls.attach_tree(tree, name, beneath=True)
        syscalls.umount(name, abi.MNT_DETACH | abi.UMOUNT_NOFOLLOW)
        os.close(tree)
    finally:
        # The mount keeps the file; its name must be there until nothing is mounted over it.
        os.unlink(_TEMPORARY, dir_fd=directory)
        os.close(directory)
