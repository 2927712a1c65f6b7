"""Files with holes: copied, digested and packed by what is in them, never by how long they are.

A digest is of the content alone: two files of equal bytes have the same one, whatever of their
zeros is a hole. It covers the length and every piece of 64 KiB that is not all zeros, with its
place.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
PIECE_BYTES = 64 << 10
DIGEST_PREFIX = "blake2b:"
MAGIC = b"vmcell-sparse-1\n"
# More would stay with the process: malloc keeps two pieces of a thread that has copied, for ever.
_COPY_BYTES = 64 << 10
_ZEROS = bytes(PIECE_BYTES)
_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)
_RECORD = struct.Struct("<QI")  # offset, length; a length of 0 ends the file


def copy_sparse(reader: int, writer: int) -> None:
    """All of `reader` into the empty file `writer`: by FICLONE where the file system shares blocks,
    else by its data extents alone, so holes stay holes. Raises OSError."""
    try:
        fcntl.ioctl(writer, FICLONE, reader)
        return
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
    length = os.fstat(reader).st_size
    os.ftruncate(writer, length)
    for start, end in _extents(reader, length):
        while start < end:
            chunk = os.pread(reader, min(end - start, _COPY_BYTES), start)
            if not chunk:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            start += os.pwrite(writer, chunk, start)


def content_digest(fd: int) -> str:
    """The digest of a file's content. Raises OSError."""
    length = os.fstat(fd).st_size
    found = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=32)
    for offset, piece in _pieces(fd, length):
        found.update(offset.to_bytes(8, "little"))
        found.update(piece)
    return DIGEST_PREFIX + found.hexdigest()


def pack(reader: int, writer: int) -> None:
    """What is in `reader`, without its zeros, to the end of `writer`. Raises OSError."""
    length = os.fstat(reader).st_size
    write_all(writer, MAGIC + length.to_bytes(8, "little"))
    for offset, piece in _pieces(reader, length):
        write_all(writer, _RECORD.pack(offset, len(piece)) + piece)
    write_all(writer, _RECORD.pack(length, 0))


def unpack(reader: int, writer: int, length: int) -> None:
    """The opposite: a file of `length` bytes. OSError, or CallerError (data_loss) for whatever
    `pack` would not have written of the file that comes out."""
    head = _read(reader, len(MAGIC) + 8)
    if head != MAGIC + length.to_bytes(8, "little"):
        raise _damaged(f"it does not begin as a packed file of {length} bytes")
    os.ftruncate(writer, length)
    behind = 0
    while True:
        offset, count = _RECORD.unpack(_read(reader, _RECORD.size))
        if offset == length and not count:
            break
        if offset < behind or offset % PIECE_BYTES or count != min(PIECE_BYTES, length - offset):
            raise _damaged(f"a piece of {count} bytes at {offset} cannot be")
        piece = _read(reader, count)
        if piece == _ZEROS[:count]:
            raise _damaged(f"the piece at {offset} is nothing but zeros")
        write_all(writer, piece, offset)
        behind = offset + count
    if os.read(reader, 1):
        raise _damaged("there is more behind its end")


def _pieces(fd: int, length: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each aligned piece that is not all zeros; the last may be shorter."""
    done = 0
    for start, end in _extents(fd, length):
        offset = max(done, start // PIECE_BYTES * PIECE_BYTES)
        while offset < end:
            piece = os.pread(fd, PIECE_BYTES, offset)
            if piece != _ZEROS[: len(piece)]:
                yield offset, piece
            offset += PIECE_BYTES
        done = offset


def _extents(fd: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is no hole."""
    position = 0
    while position < length:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind this position
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def write_all(fd: int, data: bytes, offset: int = -1) -> None:
    """All of `data`, at `offset` or where the file stands. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.write(fd, view) if offset < 0 else os.pwrite(fd, view, offset)
        offset += done if offset >= 0 else 0
        view = view[done:]


def _read(fd: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = os.read(fd, count - len(found))
        if not more:
            raise _damaged("it ends too early")
        found += more
    return found


def _damaged(what: str) -> CallerError:
    return CallerError(f"a packed file is damaged: {what}", code="data_loss")
