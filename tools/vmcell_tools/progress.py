"""What a long command is doing, on standard error: one line per step, a spinner on a terminal.

`Progress` is a context manager. On a terminal the running step spins and is printed with its time
when the next begins; elsewhere each step is one line at its beginning, so a log of a hung run ends
with what it hung on.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from rich.status import Status

BAR_WIDTH = 24


class Progress:
    """Prints the steps of `title`; `step` begins one and thereby ends the one before.

    `quiet` prints nothing, for callers whose standard error is another program's.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title = title
        self._quiet = quiet
        self._step = ""
        self._step_started = 0.0
        self._status: Status | None = None
        self._is_terminal = sys.stderr.isatty() and not quiet

    def __enter__(self) -> Self:
        if self._is_terminal:
            from rich.console import Console

            self._status = Console(stderr=True).status(self._title)
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_step()
        if self._status is not None:
            self._status.stop()
            self._status = None

    @property
    def current(self) -> str:
        """The step that is running, for the sentence of an error."""
        return self._step

    def step(self, text: str) -> None:
        """Begin `text` ("booting the kernel")."""
        self._finish_step()
        self._step, self._step_started = text, time.monotonic()
        if self._status is not None:
            self._status.update(f"{self._title}: {text}")
        else:
            self._line(text)

    def count(self, done: int, total: int) -> None:
        """`done` of `total` parts of the running step: a bar, or a line at each tenth in a log."""
        if self._status is not None:
            filled = BAR_WIDTH * done // max(1, total)
            bar = "━" * filled + "╌" * (BAR_WIDTH - filled)
            self._status.update(f"{self._title}: {self._step} {bar} {done} of {total}")
        elif done * 10 // max(1, total) != (done - 1) * 10 // max(1, total):
            self._line(f"{self._step}: {done} of {total}")

    def note(self, text: str) -> None:
        """A line of its own that is no step: a warning, a result."""
        self._line(text)

    def _finish_step(self) -> None:
        if self._step and self._status is not None:
            self._line(f"{self._step} ({time.monotonic() - self._step_started:.1f} s)")
        self._step = ""

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        if self._status is not None:
            self._status.console.print(f"{self._title}: {text}", markup=False, highlight=False)
        else:
            sys.stderr.write(f"{self._title}: {text}\n")
            sys.stderr.flush()
