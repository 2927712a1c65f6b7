"""One process started over the API: its streams, its listeners, its end.

Output goes to every listener as it comes and to nobody's memory. The rule for slow clients: the
child's pipes are read as long as one listener keeps up (or none listens: then output is dropped,
as the process must not stop because its client left); they stand still when all listeners lag. A
listener that lags MAX_LAG_BYTES behind a faster one is cut off with resource_exhausted.

The end is told when the child has ended and its output is read to the end, so a background job
that keeps the pipes open keeps the command open, as with a shell's `$(...)`. After a kill asked
for over the API, and always with a terminal, what stands there is read and leftovers are not waited
for: a terminal is closed with its shell, and whoever is left on it is hung up on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from vmcell_protos.errors import CallerError

from .journal import Journal
from .loop import READABLE, Loop, Timer
from .process_event import OutputEvent, ProcessEvent
from .spawn import Spawned, TerminalSize, set_terminal_size
from .stdin import Done, StdinWriter
from .wire.gotext import exit_text

PIPE_CHUNK_BYTES = 32 * 1024
TERMINAL_CHUNK_BYTES = 16 * 1024
_MAX_PIPE_BYTES = 1024 * 1024
SLOW_BYTES = 256 * 1024
MAX_LAG_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """What the client asked to run, as List shows it again."""

    command: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str | None
    tag: str | None


class Listener(Protocol):
    """A client's stream of events."""

    @property
    def unsent_bytes(self) -> int: ...

    def tell(self, event: ProcessEvent) -> None: ...

    def finish(self, error: CallerError | None) -> None: ...


class Process:
    """Owns the child's descriptors. `ended` is called once, with the process, at its end."""

    def __init__(
        self,
        loop: Loop,
        spawned: Spawned,
        config: ProcessConfig,
        *,
        terminal: bool,
        ended: Callable[[Process], None],
        journal: Journal,
    ) -> None:
        self.pid = spawned.pid
        self.start = ProcessEvent({"start": {"pid": self.pid}})
        self.config = config
        self.terminal = terminal
        self._loop = loop
        self._ended = ended
        self._journal = journal
        self._listeners: list[Listener] = []
        self._wait_status: int | None = None
        self._killed = False
        self._paused = False
        self.end: ProcessEvent | None = None
        self.deadline: Timer | None = None
        self.stdin = None if spawned.stdin is None else StdinWriter(loop, spawned.stdin)
        self._outputs: dict[int, str] = {spawned.stdout: "pty" if terminal else "stdout"}
        if spawned.stderr is not None:
            self._outputs[spawned.stderr] = "stderr"
        for descriptor in self._outputs:
            self._watch(descriptor)

    # Listeners.

    def listen(self, listener: Listener) -> None:
        """Send `start` now and all events from here on."""
        self._listeners.append(listener)
        listener.tell(self.start)
        self.balance()

    def leave(self, listener: Listener) -> None:
        """The listener's client is gone; the process goes on."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self.balance()

    def balance(self) -> None:
        """Read the output, or let it stand, by the rule above."""
        pause = bool(self._listeners) and all(
            listener.unsent_bytes > SLOW_BYTES for listener in self._listeners
        )
        if pause == self._paused:
            return
        self._paused = pause
        for descriptor in self._outputs:
            if pause:
                # epoll reports a hang-up even with an empty mask.
                self._loop.forget(descriptor)
            else:
                self._watch(descriptor)

    def _publish(self, event: ProcessEvent) -> None:
        for listener in tuple(self._listeners):
            if listener.unsent_bytes > MAX_LAG_BYTES:
                self._listeners.remove(listener)
                listener.finish(
                    CallerError(
                        f"the client reads too slowly: {MAX_LAG_BYTES} bytes of output wait for it",
                        code="resource_exhausted",
                    )
                )
            else:
                listener.tell(event)
        self.balance()

    # Output.

    def _watch(self, descriptor: int) -> None:
        self._loop.watch(descriptor, READABLE, lambda mask: self._on_output(descriptor))

    def _on_output(self, descriptor: int) -> None:
        if not self._read_once(descriptor) and not self._outputs:
            self._finish_if_over()

    def _read_once(self, descriptor: int) -> bool:
        """Publish one chunk; False when there is none at the moment, or never again."""
        size = TERMINAL_CHUNK_BYTES if self.terminal else PIPE_CHUNK_BYTES
        try:
            data = os.read(descriptor, size)
        except BlockingIOError:
            return False
        except OSError:
            # EIO: the last process has closed the terminal.
            data = b""
        if not data:
            self._close_output(descriptor)
            return False
        self._journal.output(self.pid, self._outputs[descriptor], data)
        self._publish(OutputEvent(self._outputs[descriptor], data))
        return True

    def _close_output(self, descriptor: int) -> None:
        del self._outputs[descriptor]
        self._loop.forget(descriptor)
        os.close(descriptor)

    # The end.

    def reaped(self, wait_status: int) -> None:
        """The child itself has ended."""
        self._wait_status = wait_status
        if self.stdin is not None:
            self.stdin.close()
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._wait_status is None or self.end is not None:
            return
        if self._outputs and not self._killed and not self.terminal:
            return
        for descriptor in tuple(self._outputs):
            # Bounded, as a survivor of the kill may write for ever; no pipe holds more (pipe(7)).
            for _ in range(_MAX_PIPE_BYTES // TERMINAL_CHUNK_BYTES):
                if not self._read_once(descriptor):
                    break
            if descriptor in self._outputs:
                self._close_output(descriptor)
        code, exited, status = exit_text(self._wait_status)
        self._journal.ended(self.pid, code, status)
        end: dict[str, object] = {"exitCode": code, "exited": exited, "status": status}
        if code != 0:
            end["error"] = status
        self.end = ProcessEvent({"end": end})
        if self.deadline is not None:
            self.deadline.cancel()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.tell(self.end)
            listener.finish(None)
        self._ended(self)

    def signal(self, number: int) -> None:
        """Signal the child's whole process group (E2B's own envd: the child alone).

        After SIGTERM and SIGKILL the end no longer waits for what others may still write. The
        group's number stays taken while any of it lives, even when the child has been reaped.
        """
        if number in (signal.SIGTERM, signal.SIGKILL):
            self._killed = True
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        self._finish_if_over()

    # Input.

    def write_input(self, kind: str, data: bytes, done: Done) -> None:
        """`kind` is "stdin" or "pty" and has to fit the process."""
        if (kind == "pty") != self.terminal:
            wanted = "pty" if self.terminal else "stdin"
            raise CallerError(
                f"error writing to stdin: process {self.pid} takes {wanted} input only",
                code="internal",
            )
        if self.stdin is None:
            raise CallerError(
                "error writing to stdin: stdin is not enabled for this process", code="internal"
            )
        self.stdin.write(data, done)

    def close_input(self) -> None:
        """End of file on stdin; closing it twice, or where there is none, is fine."""
        if self.terminal:
            raise CallerError(
                "cannot close the stdin of a PTY process: send Ctrl+D (0x04) instead",
                code="internal",
            )
        if self.stdin is not None:
            self.stdin.close_when_written()

    def resize(self, size: TerminalSize) -> None:
        if not self.terminal:
            raise CallerError(f"process {self.pid} has no PTY to resize", code="internal")
        for descriptor in self._outputs:
            set_terminal_size(descriptor, size)
