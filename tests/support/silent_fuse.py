"""A mounted file system that never answers: what a dead network disk looks like to a process."""

from __future__ import annotations

import os
import select
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INIT = 26


class SilentFuse:
    """The server of a file system on `place` that stands still as soon as it is asked anything."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        words = ["mount", "-i", "-t", "fuse", "-o", options, "silent", os.fspath(place)]
        subprocess.run(words, check=True, pass_fds=[self._fd])
        header = os.read(self._fd, 1 << 16)
        length, opcode, unique = struct.unpack_from("<IIQ", header)
        assert (length, opcode) == (len(header), INIT)
        body = struct.pack("<IIIIHHII", 7, 31, 4096, 0, 8, 8, 4096, 1).ljust(64, b"\0")
        os.write(self._fd, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)

    def wait_for_request(self) -> None:
        """Returns when somebody waits for an answer, in a way that no signal ends any more."""
        ready, _, _ = select.select([self._fd], [], [], 10.0)
        assert ready, "nobody asked the file system anything"
        os.read(self._fd, 1 << 16)

    def release(self) -> None:
        """Ends every wait with an error; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def silent_fuse(place: Path) -> Iterator[SilentFuse]:
    """Mounted on `place`, released and unmounted afterwards."""
    server = SilentFuse(place)
    try:
        yield server
    finally:
        server.release()
        subprocess.run(["umount", "-l", os.fspath(place)], check=True)
