"""Work on directory trees: make, list, remove, move; generators that yield after each few steps.

What is made belongs to the user who asked for it. Trees are removed by descriptor, so a directory
swapped for a link meanwhile leads nowhere.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress

from vmcell_protos.errors import CallerError

from .accounts import Account, Accounts
from .entry import entry_info

Steps = Generator[None, None, None]

_COPY_BYTES = 256 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_directories(path: str, owner: Account) -> bool:
    """mkdir -p, each one made is `owner`'s; False when the directory was there.

    Raises OSError, and CallerError when a file is in the way.
    """
    try:
        _make_directory(path, owner)
        return True
    except FileExistsError:
        if not os.path.isdir(path):
            raise CallerError(f"path '{path}' exists and is no directory") from None
        return False
    except FileNotFoundError:
        parent = posixpath.dirname(path)
        if parent == path:
            raise
        make_directories(parent, owner)
        # Somebody else may have made it in between; that is as good.
        with suppress(FileExistsError):
            _make_directory(path, owner)
        return True


def _make_directory(path: str, owner: Account) -> None:
    os.mkdir(path, 0o755)
    os.chown(path, owner.uid, owner.gid, follow_symlinks=False)


def list_tree(
    path: str, depth: int, accounts: Accounts
) -> Generator[None, None, list[dict[str, object]]]:
    """Entries below the directory `path`, `depth` levels deep, each directory before its own.

    Raises OSError for the root; what vanishes or may not be read below it is left out.
    """
    entries: list[dict[str, object]] = []

    def names(directory: str) -> Iterator[str]:
        return iter(sorted(os.listdir(directory)))

    levels = [(path, names(path))]
    while levels:
        directory, rest = levels[-1]
        name = next(rest, None)
        if name is None:
            levels.pop()
            continue
        full = posixpath.join(directory, name)
        yield
        try:
            entries.append(entry_info(full, accounts))
            # A link to a directory is an entry, not a way down.
            if len(levels) < depth and stat.S_ISDIR(os.lstat(full).st_mode):
                levels.append((full, names(full)))
        except OSError:
            continue
    return entries


def remove_tree(path: str) -> Steps:
    """rm -rf: nothing at `path` is success. The root of the file system is refused."""
    if path == "/":
        raise CallerError("the root directory cannot be removed")
    parent, name = posixpath.split(path)
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
    except (FileNotFoundError, NotADirectoryError):
        return
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from _remove_below(descriptor, name)
    finally:
        os.close(descriptor)


def _remove_below(parent: int, name: str) -> Steps:
    """Remove the directory `name` of the open directory `parent`; depth costs one descriptor."""
    with suppress(FileNotFoundError), ExitStack() as stack:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        stack.callback(os.close, descriptor)
        with os.scandir(descriptor) as found:
            children = [(item.name, item.is_dir(follow_symlinks=False)) for item in found]
        for child, is_directory in children:
            yield
            if is_directory:
                yield from _remove_below(descriptor, child)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(child, dir_fd=descriptor)
        os.rmdir(name, dir_fd=parent)


def move(source: str, destination: str, owner: Account) -> Steps:
    """rename(2), missing parents made for `owner`; copies and removes where rename cannot.

    It cannot between file systems, and not for a directory of an overlay's lower layer (EXDEV,
    kernel's overlayfs.rst). A copy that fails half-way is removed, source and destination are then
    untouched.
    """
    os.lstat(source)
    if destination.startswith(source.rstrip("/") + "/"):
        raise CallerError(f"cannot move '{source}' into itself")
    make_directories(posixpath.dirname(destination), owner)
    try:
        os.rename(source, destination)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # Beside the destination and under another name, so that what is there stays until the end.
    staging = posixpath.join(posixpath.dirname(destination), f".move-{os.urandom(8).hex()}")
    try:
        yield from _copy(source, staging)
        os.rename(staging, destination)
    except BaseException:
        for _ in remove_tree(staging):
            pass
        raise
    yield from remove_tree(source)


def _copy(source: str, destination: str) -> Steps:
    """One entry with all below it; with its owner, mode and times."""
    status = os.lstat(source)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), destination)
    elif stat.S_ISDIR(status.st_mode):
        os.mkdir(destination, 0o700)
        for name in sorted(os.listdir(source)):
            yield
            yield from _copy(posixpath.join(source, name), posixpath.join(destination, name))
    elif stat.S_ISREG(status.st_mode):
        yield from _copy_file(source, destination)
    else:
        raise CallerError(f"cannot move '{source}' to another file system: it is a special file")
    _copy_attributes(source, destination, status)


def _copy_file(source: str, destination: str) -> Steps:
    with ExitStack() as stack:
        reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, reading)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        writing = os.open(destination, flags, 0o600)
        stack.callback(os.close, writing)
        yield from copy_bytes(reading, writing)


def copy_bytes(reading: int, writing: int) -> Steps:
    """All that is left of the one descriptor's file to the other's; both stay the caller's."""
    while piece := os.read(reading, _COPY_BYTES):
        view = memoryview(piece)
        while view:
            view = view[os.write(writing, view) :]
        yield


def _copy_attributes(source: str, destination: str, status: os.stat_result) -> None:
    with suppress(PermissionError):  # a container may lack CAP_CHOWN
        os.chown(destination, status.st_uid, status.st_gid, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return
    with suppress(OSError):
        for name in os.listxattr(source):
            if name.startswith("user."):
                os.setxattr(destination, name, os.getxattr(source, name))
    os.chmod(destination, stat.S_IMODE(status.st_mode))
    os.utime(destination, ns=(status.st_atime_ns, status.st_mtime_ns))
