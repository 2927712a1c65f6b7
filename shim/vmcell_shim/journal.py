"""The shim's log: lines for containerd through the bundle's `log` FIFO, and for us in a file.

containerd reads the FIFO and copies lines to its own stderr (runtime/v2/binary.go); after a crash
of the daemon nobody reads it, so it is opened and written without blocking and lost lines are
lost. The file is the sandbox's own `shim.log`. Form: logrus text, which containerd's users grep.

Lines quote what guests say, so no line holds a character that a terminal acts upon, none is longer
than LINE_CHARACTERS, and of more than LINES_PER_WINDOW within WINDOW_S only the number is told.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

LINE_CHARACTERS = 16 << 10
LINES_PER_WINDOW = 200
WINDOW_S = 5.0
_LIMIT_BYTES = 1 << 20


def printable(text: str, most: int = LINE_CHARACTERS) -> str:
    """`text` with an escape for each character that cannot be seen, cut at `most` characters."""
    shown = text[:most]
    if not shown.isprintable():
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown
        )
    if len(text) <= most and len(shown) <= most:
        return shown
    return f"{shown[:most]}… ({len(text)} characters)"


class Journal:
    """Lines to both places; any thread may write. Owns its descriptors until close()."""

    def __init__(self, fifo_path: str, sandbox: str) -> None:
        self._fifo_path = fifo_path
        self._sandbox = sandbox
        self._fifo = -1
        self._file = -1
        self._file_bytes = 0
        self._lock = threading.Lock()
        self._early: list[bytes] = []
        self._window_end_s = 0.0
        self._window_lines = 0
        self._left_out = 0

    def attach(self, path: str) -> None:
        """From now on lines also go to the file at `path`, those logged so far first."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            early, self._early = self._early, []
            for line in early:
                self._write_file(line)

    def info(self, text: str) -> None:
        self._log("info", text)

    def warning(self, text: str) -> None:
        self._log("warning", text)

    def error(self, text: str) -> None:
        self._log("error", text)

    def exception(
        self,
        kind: type[BaseException],
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """A bug of ours with its traceback; has the shape of sys.excepthook."""
        self._log("error", "".join(traceback.format_exception(kind, error, trace)))

    def catch_bugs(self) -> None:
        """Exceptions that end a thread or the process are logged here from now on."""
        sys.excepthook = self.exception
        threading.excepthook = lambda args: self.exception(
            args.exc_type, args.exc_value, args.exc_traceback
        )

    def close(self) -> None:
        with self._lock:
            for fd in (self._fifo, self._file):
                if fd >= 0:
                    os.close(fd)
            self._fifo = self._file = -1

    def _log(self, level: str, text: str) -> None:
        left_out = self._account()
        if left_out < 0:
            return
        if left_out:
            self._put("warning", f"{left_out} lines were left out: more came than are written")
        self._put(level, text)

    def _account(self) -> int:
        """Counts one line: -1 if it is not to be written, else how many were not before it."""
        now_s = time.monotonic()
        with self._lock:
            if now_s >= self._window_end_s:
                self._window_end_s, self._window_lines = now_s + WINDOW_S, 0
            self._window_lines += 1
            if self._window_lines > LINES_PER_WINDOW:
                self._left_out += 1
                return -1
            left_out, self._left_out = self._left_out, 0
            return left_out

    def _put(self, level: str, text: str) -> None:
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
        quoted = printable(text.rstrip("\n").replace("\\", "\\\\").replace('"', '\\"'))
        fraction = now % 10**9
        line = f'time="{stamp}.{fraction:09d}Z" level={level} msg="{quoted}" id={self._sandbox}\n'
        data = line.encode(errors="replace")
        with self._lock:
            self._write_fifo(data)
            if self._file >= 0:
                self._write_file(data)
            elif len(self._early) < 64:
                self._early.append(data)

    def _write_file(self, data: bytes) -> None:
        if self._file_bytes + len(data) > _LIMIT_BYTES:
            return
        self._file_bytes += len(data)
        try:
            os.write(self._file, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _write_fifo(self, data: bytes) -> None:
        if not self._fifo_path:
            return
        try:
            if self._fifo < 0:
                self._fifo = os.open(self._fifo_path, os.O_WRONLY | os.O_NONBLOCK)
            os.write(self._fifo, data)
        except OSError as error:
            # No reader, a full pipe or a removed bundle: containerd's copy of the line is lost.
            if error.errno in (errno.EPIPE, errno.EBADF) and self._fifo >= 0:
                os.close(self._fifo)
                self._fifo = -1
