"""Texts that E2B's clients know from Go: FileMode.String, RFC 3339 times, ProcessState.String."""

from __future__ import annotations

import calendar
import os
import signal
import stat
import time
from typing import NamedTuple

# os/types.go: letters in this order, then the nine permission bits.
_TYPE_LETTERS = (
    (stat.S_IFDIR, "d"),
    (stat.S_IFLNK, "L"),
    (stat.S_IFBLK, "D"),
    (stat.S_IFIFO, "p"),
    (stat.S_IFSOCK, "S"),
    (stat.S_IFCHR, "Dc"),
)
_BIT_LETTERS = ((stat.S_ISUID, "u"), (stat.S_ISGID, "g"), (stat.S_ISVTX, "t"))

# strsignal(3) as Go has it in syscall/zerrors_linux_amd64.go.
_SIGNAL_TEXTS: dict[int, str] = {
    signal.SIGHUP: "hangup",
    signal.SIGINT: "interrupt",
    signal.SIGQUIT: "quit",
    signal.SIGILL: "illegal instruction",
    signal.SIGTRAP: "trace/breakpoint trap",
    signal.SIGABRT: "aborted",
    signal.SIGBUS: "bus error",
    signal.SIGFPE: "floating point exception",
    signal.SIGKILL: "killed",
    signal.SIGUSR1: "user defined signal 1",
    signal.SIGSEGV: "segmentation fault",
    signal.SIGUSR2: "user defined signal 2",
    signal.SIGPIPE: "broken pipe",
    signal.SIGALRM: "alarm clock",
    signal.SIGTERM: "terminated",
}


# timestamp.proto: from 0001-01-01T00:00:00Z to 9999-12-31T23:59:59.999999999Z.
_FIRST_NS = -62_135_596_800 * 1_000_000_000
_LAST_NS = 253_402_300_800 * 1_000_000_000 - 1


def file_mode_text(mode: int) -> str:
    """`-rw-r--r--`, `drwxr-xr-x`, `Lrwxrwxrwx`, `dtrwxrwxrwx` for st_mode."""
    kind = stat.S_IFMT(mode)
    letters = "".join(letter for bits, letter in _TYPE_LETTERS if bits == kind)
    letters += "".join(letter for bit, letter in _BIT_LETTERS if mode & bit)
    permissions = "".join(
        letter if mode & (1 << (8 - n)) else "-" for n, letter in enumerate("rwxrwxrwx")
    )
    return (letters or "-") + permissions


def rfc3339(unix_ns: int) -> str:
    """`2024-05-01T12:00:00Z`, with 3, 6 or 9 digits of fraction where needed (protobuf's rule).

    Times that no Timestamp can hold (before the year 1, after 9999) become the nearest one.
    """
    seconds, nanoseconds = divmod(min(max(unix_ns, _FIRST_NS), _LAST_NS), 1_000_000_000)
    t = time.gmtime(seconds)
    text = (
        f"{t.tm_year:04d}-{t.tm_mon:02d}-{t.tm_mday:02d}"
        f"T{t.tm_hour:02d}:{t.tm_min:02d}:{t.tm_sec:02d}"
    )
    if nanoseconds:
        digits = f"{nanoseconds:09d}"
        while digits.endswith("000"):
            digits = digits[:-3]
        text += "." + digits
    return text + "Z"


def unix_ns(text: str) -> int:
    """The inverse of `rfc3339`, for its own texts."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    date, _, clock = whole.partition("T")
    year, month, day = map(int, date.rsplit("-", 2))
    hour, minute, second = map(int, clock.split(":"))
    seconds = calendar.timegm((year, month, day, hour, minute, second))
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0") or "0")


class ExitText(NamedTuple):
    """How an ended process is told: exit code (-1: by a signal), whether it exited, its status."""

    exit_code: int
    exited: bool
    status: str


def exit_text(wait_status: int) -> ExitText:
    """`wait_status` as waitpid(2) gives it."""
    if os.WIFEXITED(wait_status):
        code = os.WEXITSTATUS(wait_status)
        return ExitText(code, True, f"exit status {code}")
    number = os.WTERMSIG(wait_status)
    name = _SIGNAL_TEXTS.get(number)
    text = f"signal: {name or f'signal {number}'}"
    if os.WCOREDUMP(wait_status):
        text += " (core dumped)"
    return ExitText(-1, False, text)
