"""The sparse ext4 file a container writes to: a copy of a template made once per host.

Copying a template costs 2 ms where mkfs.ext4 costs many. A container that goes on from a snapshot
begins with a copy of the snapshot's disk instead.
"""

from __future__ import annotations

import errno
import os
import stat

from vmcell_protos.errors import HostError
from vmcell_shim.file_lock import create_locked
from vmcell_shim.sparse import copy_sparse
from vmcell_shim.spawn import run_program

# lazy: the guest's kernel writes the tables when it needs them; a small journal is enough for a
# disk whose writers are one container.
_MKFS_TIMEOUT_S = 120
_MKFS = ["mkfs.ext4", "-q", "-F", "-m0", "-Jsize=8", "-Elazy_itable_init=1,lazy_journal_init=1"]


def writable_disk(path: str, size_mib: int, cache_dir: str) -> None:
    """Makes the disk at `path` unless it is there (a container started again keeps its writes).

    Raises HostError; a failed copy leaves nothing behind.
    """
    if os.path.exists(path):
        return
    try:
        copy_disk(_template(size_mib, cache_dir), path)
    except OSError as error:
        raise HostError(f"cannot make the writable disk {path}: {error}") from error


def copy_disk(source: str, path: str) -> None:
    """A copy of the file `source` at `path`, whatever was there. OSError; nothing is left then."""
    partial = path + ".partial"
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        writer = os.open(partial, flags, 0o600)
        try:
            copy_sparse(reader, writer)
            os.rename(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def open_disk(path: str, *, read_only: bool = False) -> int:
    """The descriptor for a virtio-blk device; the caller closes it. Raises HostError.

    A block device is opened exclusively: one that the host has mounted, or another guest uses, is
    refused, for two file systems' drivers on one disk destroy it.
    """
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL
        return os.open(path, flags)
    except OSError as error:
        busy = "; it is mounted on the host or used by another guest"
        detail = busy if error.errno == errno.EBUSY else ""
        raise HostError(f"cannot open the disk {path}: {error.strerror}{detail}") from error


def _template(size_mib: int, cache_dir: str) -> str:
    """The template of that size; one process makes it, others wait for it."""
    directory = os.path.join(cache_dir, "ext4")
    template = os.path.join(directory, f"{size_mib}-mib.ext4")
    partial = template + ".partial"
    while not os.path.exists(template):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = create_locked(partial, timeout_s=_MKFS_TIMEOUT_S)
        if fd is not None:
            try:
                _make_template(fd, partial, template, size_mib)
            finally:
                os.close(fd)
    return template


def _make_template(fd: int, partial: str, template: str, size_mib: int) -> None:
    """`fd` is open on `partial`, which is new and locked."""
    try:
        os.ftruncate(fd, size_mib << 20)
        try:
            code, output = run_program([*_MKFS, partial], timeout_s=_MKFS_TIMEOUT_S)
        except FileNotFoundError as error:
            raise HostError("cannot run mkfs.ext4; install e2fsprogs") from error
        if code:
            raise HostError(f"cannot make the disk template {template}: mkfs.ext4: {output}")
        os.rename(partial, template)
    except BaseException:
        os.unlink(partial)
        raise
