"""fork, setsid and exec of one command, as another user, on pipes or on a pseudo-terminal."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import termios
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import NoReturn

from .accounts import Account

_UMASK = 0o022
# What is ignored, by CPython or by whoever started envd, would stay ignored across exec.
_RESETTABLE_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_MAX_DESCRIPTOR = 1 << 20

# envd's ends: stdin, stdout, stderr.
_Streams = tuple[int | None, int, int | None]


@dataclass(frozen=True, kw_only=True)
class TerminalSize:
    """Columns and rows of a pseudo-terminal, 0 to 65535 each."""

    columns: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to run: an absolute or relative `executable`, its argv (with argv[0]), whose rights."""

    executable: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str
    account: Account
    terminal: TerminalSize | None
    stdin: bool


@dataclass(frozen=True, kw_only=True)
class Spawned:
    """A running child and envd's non-blocking ends, which the caller owns.

    With a terminal `stdin` and `stdout` are two descriptors of its master side and `stderr` is
    None; without `Launch.stdin` there is no `stdin`.
    """

    pid: int
    stdin: int | None
    stdout: int
    stderr: int | None


class SpawnError(Exception):
    """The child could not be started; `step` is "fork", "chdir", "exec" or "setup"."""

    def __init__(self, step: str, error_number: int) -> None:
        super().__init__(os.strerror(error_number).lower())
        self.step = step
        self.error_number = error_number


def set_terminal_size(descriptor: int, size: TerminalSize) -> None:
    """TIOCSWINSZ (ioctl_tty(2)); the foreground group gets SIGWINCH when it changes."""
    window = struct.pack("HHHH", min(size.rows, 0xFFFF), min(size.columns, 0xFFFF), 0, 0)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, window)


class _Ends:
    """Descriptors of both sides; the parent's are closed again unless `keep()` is called."""

    def __init__(self) -> None:
        self._parents = ExitStack()
        self._childs = ExitStack()
        self.child: list[int] = []

    def pipe(self, *, child_reads: bool) -> int:
        read, write = os.pipe2(os.O_CLOEXEC)
        mine, theirs = (write, read) if child_reads else (read, write)
        self.own(mine)
        self.give(theirs)
        return mine

    def own(self, descriptor: int) -> int:
        self._parents.callback(os.close, descriptor)
        os.set_blocking(descriptor, False)
        return descriptor

    def give(self, descriptor: int) -> None:
        self._childs.callback(os.close, descriptor)
        self.child.append(descriptor)

    def close_childs(self) -> None:
        self._childs.close()

    def keep(self) -> None:
        self._parents.pop_all()

    def close(self) -> None:
        self._childs.close()
        self._parents.close()


def spawn(launch: Launch) -> Spawned:
    """Start the child in a session and process group of its own; returns once exec succeeded.

    Raises SpawnError, and leaves neither descriptors nor a child behind then (the child's exit
    status is still to be reaped).
    """
    ends = _Ends()
    try:
        if launch.terminal is not None:
            stdin, stdout, stderr = _open_terminal(ends, launch.terminal, launch.account)
        else:
            stdin, stdout, stderr = _open_pipes(ends, with_stdin=launch.stdin)
        pid = _start(launch, ends)
    except OSError as error:
        ends.close()
        raise SpawnError("fork", error.errno or 0) from None
    except BaseException:
        ends.close()
        raise
    ends.close_childs()
    ends.keep()
    return Spawned(pid=pid, stdin=stdin, stdout=stdout, stderr=stderr)


def _open_terminal(ends: _Ends, size: TerminalSize, account: Account) -> _Streams:
    master, slave = os.openpty()
    ends.own(master)
    ends.give(slave)
    ends.child *= 3
    # grantpt(3) gave it to envd's user; group and mode (tty, 0620) are devpts' own.
    os.fchown(slave, account.uid, -1)
    set_terminal_size(slave, size)
    # Two descriptors, so that reading and writing are watched apart.
    writer = ends.own(fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, 3))
    return writer, master, None


def _open_pipes(ends: _Ends, *, with_stdin: bool) -> _Streams:
    if with_stdin:
        stdin: int | None = ends.pipe(child_reads=True)
    else:
        stdin = None
        ends.give(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    return stdin, ends.pipe(child_reads=False), ends.pipe(child_reads=False)


def _start(launch: Launch, ends: _Ends) -> int:
    argv = [os.fsencode(argument) for argument in launch.argv]
    environment = {os.fsencode(k): os.fsencode(v) for k, v in launch.environment.items()}
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    try:
        # No signal may run envd's handlers in the child.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                _become(launch, argv, environment, ends.child, report_write, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(report_write)
        report_write = -1
        report = os.read(report_read, 64)
    finally:
        os.close(report_read)
        if report_write >= 0:
            os.close(report_write)
    if report:
        step, _, number = report.decode("ascii").partition(":")
        raise SpawnError(step, int(number))
    return pid


def _become(
    launch: Launch,
    argv: list[bytes],
    environment: dict[bytes, bytes],
    streams: list[int],
    report: int,
    signal_mask: set[int | signal.Signals],
) -> NoReturn:
    """The child's side; never returns. `streams` are its descriptors 0, 1 and 2 to be."""
    step = "setup"
    try:
        os.setsid()
        # Above the standard streams, whatever numbers were free in envd.
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, 3)
        streams = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 3) for stream in streams]
        for number, stream in enumerate(streams):
            os.dup2(stream, number, inheritable=True)
        if launch.terminal is not None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.closerange(3, report)
        os.closerange(report + 1, _MAX_DESCRIPTOR)
        _reset_oom_score()
        os.umask(_UMASK)
        os.setgroups(launch.account.groups)
        os.setgid(launch.account.gid)
        os.setuid(launch.account.uid)
        step = "chdir"
        os.chdir(launch.directory)
        step = "exec"
        signal.set_wakeup_fd(-1)
        for number in _RESETTABLE_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)
        os.execve(launch.executable, argv, environment)
    except OSError as error:
        os.write(report, f"{step}:{error.errno}".encode("ascii"))
    except ValueError:
        os.write(report, f"{step}:{errno.EINVAL}".encode("ascii"))
    finally:
        os._exit(127)


def _reset_oom_score() -> None:
    """envd may be protected from the OOM killer (proc(5)); what it starts must not be.

    Only ever raised: lowering needs a capability that containers lack. Where /proc is missing or
    read-only the score stays.
    """
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
        if file.read(16).startswith(b"-"):
            file.seek(0)
            file.write(b"0")
