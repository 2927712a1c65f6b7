"""The sparse ext4 file a container writes to: a copy of a template made once per host.

Copying a template costs 2 ms where mkfs.ext4 costs many: by FICLONE where the file system shares
blocks, else by its data extents alone (SEEK_DATA), so holes stay holes.
"""

from __future__ import annotations

import errno
import fcntl
import os

from vmcell_protos.errors import HostError
from vmcell_shim.spawn import run_program

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
# lazy: the guest's kernel writes the tables when it needs them; a small journal is enough for a
# disk whose writers are one container.
_MKFS = ["mkfs.ext4", "-q", "-F", "-m0", "-Jsize=8", "-Elazy_itable_init=1,lazy_journal_init=1"]


def writable_disk(path: str, size_mib: int, cache_dir: str) -> None:
    """Makes the disk at `path` unless it is there (a container started again keeps its writes).

    Raises HostError; a failed copy leaves nothing behind.
    """
    if os.path.exists(path):
        return
    try:
        template = _template(size_mib, cache_dir)
        partial = path + ".partial"
        try:
            _copy_sparse(template, partial)
            os.rename(partial, path)
        except BaseException:
            if os.path.exists(partial):
                os.unlink(partial)
            raise
    except OSError as error:
        raise HostError(f"cannot make the writable disk {path}: {error}") from error


def _template(size_mib: int, cache_dir: str) -> str:
    directory = os.path.join(cache_dir, "ext4")
    template = os.path.join(directory, f"{size_mib}-mib.ext4")
    if os.path.exists(template):
        return template
    os.makedirs(directory, mode=0o700, exist_ok=True)
    # Made under a name of its own: two shims that race both finish, and one of them wins.
    partial = f"{template}.{os.getpid()}.partial"
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, size_mib << 20)
        finally:
            os.close(fd)
        try:
            code, output = run_program([*_MKFS, partial], timeout_s=120)
        except FileNotFoundError as error:
            raise HostError("cannot run mkfs.ext4; install e2fsprogs") from error
        if code:
            raise HostError(f"cannot make the disk template {template}: mkfs.ext4: {output}")
        os.rename(partial, template)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
    return template


def _copy_sparse(source: str, target: str) -> None:
    reader = os.open(source, os.O_RDONLY)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if not _clone(reader, writer):
                _copy_extents(reader, writer, os.fstat(reader).st_size)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _clone(reader: int, writer: int) -> bool:
    try:
        fcntl.ioctl(writer, FICLONE, reader)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _copy_extents(reader: int, writer: int, size: int) -> None:
    os.ftruncate(writer, size)
    position = 0
    while True:
        try:
            start = os.lseek(reader, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind this position
                return
            raise
        position = os.lseek(reader, start, os.SEEK_HOLE)
        while start < position:
            chunk = os.pread(reader, min(position - start, 1 << 20), start)
            start += os.pwrite(writer, chunk, start)
