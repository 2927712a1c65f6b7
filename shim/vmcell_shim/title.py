"""What `ps` shows of a process that never executed a program of its own.

The command line in /proc/PID/cmdline is the process's own memory, from arg_start to arg_end of
/proc/PID/stat (proc(5), fields 48 and 49). The zygote's has room at its end, as a last word of
blanks; children write their own line there, through /proc/self/mem.
"""

from __future__ import annotations

import os
from contextlib import suppress

ROOM = " " * 1024


class Title:
    """Where the command line stands, which is the same in all children."""

    def __init__(self) -> None:
        with open("/proc/self/stat", "rb") as file:
            stat = file.read()
        # The command name may hold spaces and brackets; field 3 stands behind its last bracket.
        fields = stat[stat.rindex(b")") + 2 :].split()
        self._start = int(fields[45])
        self._room_bytes = int(fields[46]) - self._start

    def set(self, words: list[str], name: str) -> None:
        """`words` become the command line, cut to the room there is; `name`, 15 bytes, the name."""
        line = b"".join(os.fsencode(word) + b"\0" for word in words)[: self._room_bytes - 1]
        # A kernel that forbids it leaves an odd line in `ps`, and nothing else.
        with suppress(OSError):
            _write("/proc/self/mem", line.ljust(self._room_bytes, b"\0"), self._start)
        self.name(name)

    def name(self, name: str) -> None:
        """Only the name."""
        with suppress(OSError):
            _write("/proc/self/comm", os.fsencode(name)[:15])


def _write(path: str, data: bytes, offset: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
        os.write(fd, data)
    finally:
        os.close(fd)
