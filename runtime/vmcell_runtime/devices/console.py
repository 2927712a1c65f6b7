"""The serial console's far end: a capped log, and what the kernel's lines say about its end.

The bytes go to the log as they come, control characters too; what is quoted elsewhere (end
reasons) is made printable first. The guest decides how much it writes, so memory and file are
bounded: 1 MiB of file, 1 KiB of a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable

LOG_LIMIT_BYTES = 1 << 20
LINE_LIMIT_BYTES = 1024
_FULL = b"\n[vmcell: console log is full, the rest is dropped]\n"

# kernel/panic.c prints the first; kernel/reboot.c the others, before the machine is told.
_PANIC = "Kernel panic - not syncing"
_ORDERLY = ("reboot: Restarting system", "reboot: Power down", "reboot: System halted")
_STOPS = _ORDERLY[1:]


class LastWords:
    """What the kernel said about its end: the panic line, the orderly line; None until then.

    `on_end` is called once, when the guest has said that it will not go on by itself: a panic, or a
    power-off or halt, which without ACPI leaves it standing still.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.panic: str | None = None
        self.orderly: str | None = None
        self._on_end = on_end

    def line(self, text: str) -> None:
        """Takes one line of the console, without its end."""
        if self.panic is not None:
            return
        if _PANIC in text:
            self.panic = text[text.index(_PANIC) :]
            self._on_end()
            return
        said = next((words for words in _ORDERLY if words in text), None)
        if said is not None and self.orderly is None:
            self.orderly = said
            if said in _STOPS:
                self._on_end()


class ConsoleLog:
    """Bytes of the console into a file, up to 1 MiB; `watch` sees each line made printable.

    Does not own `fd`; without one only `watch` sees anything. Used under the serial device's lock.
    """

    def __init__(self, fd: int | None, watch: Callable[[str], None]) -> None:
        self._fd = fd
        self._watch = watch
        self._line = bytearray()
        self._pending = bytearray()
        self._room_bytes = LOG_LIMIT_BYTES
        self.dropped_bytes = 0

    def put(self, byte: int) -> None:
        """Takes one byte; a line reaches the file when it ends or is 1 KiB long."""
        self._pending.append(byte)
        if byte == 0x0A:
            self._end_line()
        elif len(self._line) < LINE_LIMIT_BYTES:
            self._line.append(byte)
        if byte == 0x0A or len(self._pending) >= LINE_LIMIT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending; a full disk or a full log drops it and counts."""
        data = bytes(self._pending)
        self._pending.clear()
        if self._fd is None or not data:
            return
        if len(data) > self._room_bytes:
            self.dropped_bytes += len(data)
            data, self._room_bytes = (_FULL, -1) if self._room_bytes >= 0 else (b"", -1)
        else:
            self._room_bytes -= len(data)
        try:
            os.write(self._fd, data)
        except OSError:
            self.dropped_bytes += len(data)

    def _end_line(self) -> None:
        text = printable(self._line)
        self._line.clear()
        self._watch(text)


def printable(line: bytes | bytearray) -> str:
    """The line as text, with everything that could steer a terminal replaced."""
    text = line.decode("utf-8", "replace").rstrip("\r")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
