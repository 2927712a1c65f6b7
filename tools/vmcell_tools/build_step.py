"""One command of a build: run to its end or to a deadline, output kept, failure told in a sentence.

The command gets a process group of its own; the whole group is gone when `run_step` returns or
raises, so an interrupted build leaves no compiler behind.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vmcell_protos.errors import HostError

# What strerror() and the tools print for ENOSPC and EDQUOT in the C locale.
FULL_DISK_PHRASES = ("No space left on device", "Disk quota exceeded", "disk full")
TOLD_LINES = 6


def run_step(
    command: Sequence[str | Path],
    *,
    deadline_s: float,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> str:
    """Run `command` and return what it printed, both streams together.

    `environment` is added to ours; the locale is always C. `log` keeps the output also when the
    command fails. Raises OSError(ENOSPC) when the output says that a disk is full, HostError for a
    missing command, any other failure, and the deadline.
    """
    words = [os.fspath(word) for word in command]
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            words,
            cwd=directory,
            env={**os.environ, **(environment or {}), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise HostError(f"{words[0]} is not installed; run: tools/install-packages") from error
    expired = threading.Event()
    timer = threading.Timer(deadline_s, _expire, (process, expired))
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if on_line is not None:
                on_line(line)
        status = process.wait()
    finally:
        timer.cancel()
        _end_group(process)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if log is not None:
            log.write_text("".join(lines))
    output = "".join(lines)
    if expired.is_set():
        raise HostError(f"{words[0]} had not ended after {deadline_s:.0f} s{_told(lines, log)}")
    if status:
        if any(phrase in output for phrase in FULL_DISK_PHRASES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), words[0])
        raise HostError(f"{words[0]} failed with status {status}{_told(lines, log)}")
    return output


def _expire(process: subprocess.Popen[str], expired: threading.Event) -> None:
    expired.set()
    _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _told(lines: Sequence[str], log: Path | None) -> str:
    """The end of the output, and where the rest is."""
    tail = " | ".join(line.strip() for line in lines[-TOLD_LINES:] if line.strip())
    where = f" (all of it: {log})" if log is not None else ""
    return f": {tail or 'it printed nothing'}{where}"
