"""What the processes of the contract machine run, and what may be left when they are gone."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
from shim_harness import wait_until

# Says hello, then ends as its input says, and with 9 at the end of its input.
WAITS = ("/bin/sh", "-c", 'echo hello; read -r code || exit 9; exit "$code"')
SHORT = ("/bin/sh", "-c", "echo hello; exit 3")
MISSING = ("/no/such/program",)


class Program:
    """What one process runs, and the client's ends of its FIFOs."""

    def __init__(self, directory: Path, number: int, args: tuple[str, ...], terminal: bool) -> None:
        self.args, self.terminal = args, terminal
        self.stdin = str(directory / f"{number}-in") if args is WAITS else ""
        self.stdout = str(directory / f"{number}-out")
        for path in filter(None, (self.stdin, self.stdout)):
            os.mkfifo(path)
        self.reader = os.open(self.stdout, os.O_RDONLY | os.O_NONBLOCK)

    def say(self, status: int) -> None:
        """The program, which runs, is told to end with that status."""
        with open(self.stdin, "wb", buffering=0) as file:
            file.write(b"%d\n" % status)

    def check_output(self, *, whole: bool) -> None:
        """The process has ended, so its stream has too; `whole`: it got to say all it says."""
        output = b""
        while chunk := os.read(self.reader, 4096):
            output += chunk
        if self.terminal:
            # It echoes what it is sent, before or after that.
            assert not whole or b"hello\r\n" in output, output
        else:
            assert output == b"hello\n" if whole else output in (b"", b"hello\n"), output

    def close(self) -> None:
        os.close(self.reader)
        for path in filter(None, (self.stdin, self.stdout)):
            os.unlink(path)


class Census:
    """Descriptors, threads and children of this process; what is new at the end is a leak."""

    def __init__(self) -> None:
        gc.collect()
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()

    def check(self) -> None:
        wait_until(lambda: threading.active_count() <= self.threads, "the end of all threads")
        gc.collect()
        names = [os.readlink(f"/proc/self/fd/{name}") for name in _descriptors()]
        assert len(names) <= self.descriptors, names
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def _descriptors() -> list[str]:
    return [
        name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")
    ]
