"""A file's bytes to a socket without passing through this process (sendfile(2))."""

from __future__ import annotations

import errno
import os
import socket

from .exchange import FilePart

# One turn's share: what is on the disk still has to be read from it meanwhile.
_MAX_PIECE_BYTES = 1024 * 1024
_COPIED_PIECE_BYTES = 256 * 1024
# File systems that cannot give their pages away (sendfile(2), "EINVAL").
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def send_file_piece(sock: socket.socket, part: FilePart) -> int:
    """How many bytes the socket took, 0 at the file's end; raises OSError, BlockingIOError too."""
    try:
        count = min(part.left, _MAX_PIECE_BYTES)
        return os.sendfile(sock.fileno(), part.descriptor, part.offset, count)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    piece = os.pread(part.descriptor, min(part.left, _COPIED_PIECE_BYTES), part.offset)
    return sock.send(piece) if piece else 0
