"""A file on its way into a volume: written beside the volumes, then put in place in one step.

So a body that breaks off leaves the old file as it was, and no sandbox sees half a file.
"""

from __future__ import annotations

import contextlib
import os
import secrets


class Upload:
    """A file that is nobody's yet. The caller calls `close`, whatever happens; idempotent."""

    def __init__(self, uploads: int) -> None:
        """`uploads` is the open directory, and stays the caller's; raises OSError."""
        self._uploads = uploads
        self._name = secrets.token_hex(12)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._name, flags, 0o600, dir_fd=uploads)

    def write(self, data: bytes) -> None:
        """Appends all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def place(
        self, directory: int, name: bytes, *, uid: int, gid: int, mode: int, replace: bool
    ) -> None:
        """Gives the file its owner and mode and puts it into an open directory.

        Raises OSError: EEXIST for a name that is taken unless `replace`; EISDIR for a directory.
        """
        if (os.fstat(self._fd).st_uid, os.fstat(self._fd).st_gid) != (uid, gid):
            os.fchown(self._fd, uid, gid)
        os.fchmod(self._fd, mode)
        os.fsync(self._fd)
        if replace:
            os.rename(self._name, name, src_dir_fd=self._uploads, dst_dir_fd=directory)
            return
        os.link(
            self._name,
            name,
            src_dir_fd=self._uploads,
            dst_dir_fd=directory,
            follow_symlinks=False,
        )

    def close(self) -> None:
        """Forgets the file; what was placed stays."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._uploads)
