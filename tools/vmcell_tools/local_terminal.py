"""The terminal that this process was started in: raw for a while, and its size."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """In characters."""

    columns: int
    rows: int


def size_of(descriptor: int) -> Size:
    """The size now; one that nobody set is 80 times 24."""
    found = os.get_terminal_size(descriptor)
    return Size(columns=found.columns or 80, rows=found.lines or 24)


@contextlib.contextmanager
def raw_terminal(descriptor: int, resized: Callable[[Size], None]) -> Iterator[None]:
    """Keys go through as they are, Ctrl-C too; `resized` is told by SIGWINCH. As it was, at the
    end."""

    def handle(number: int, frame: object) -> None:
        resized(size_of(descriptor))

    before = termios.tcgetattr(descriptor)
    handler = signal.signal(signal.SIGWINCH, handle)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        signal.signal(signal.SIGWINCH, handler)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
