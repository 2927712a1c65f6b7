"""What happened here: starts, output and ends of processes, for `GET /logs`.

The newest entries only, in memory, so that a talkative process costs neither memory nor disk. Of
each piece of output the beginning is kept; environments are not, as secrets live there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

MOST_ENTRIES = 1000
MOST_CHARACTERS = 256 * 1024
OUTPUT_BYTES = 1024
_COMMAND_CHARACTERS = 1024


class Journal:
    """At most MOST_ENTRIES entries with MOST_CHARACTERS of text together, oldest first."""

    def __init__(self) -> None:
        self._entries: deque[dict[str, object]] = deque()
        self._lengths: deque[int] = deque()
        self._characters = 0

    def started(self, pid: int, command: str, arguments: Sequence[str]) -> None:
        """A process of the API runs."""
        words = _joined(command, arguments)
        self._add("info", f"process {pid} started: {words}", event="process_start", pid=str(pid))

    def refused(self, command: str, arguments: Sequence[str], reason: str) -> None:
        """A process could not be started."""
        words = f"cannot start {_joined(command, arguments)}: {reason}"
        self._add("error", words, event="process_refused")

    def output(self, pid: int, stream: str, data: bytes) -> None:
        """A process wrote; of one piece the first OUTPUT_BYTES are kept."""
        self._add(
            "info",
            data[:OUTPUT_BYTES].decode("utf-8", "replace"),
            event="process_output",
            pid=str(pid),
            stream=stream,
            bytes=str(len(data)),
        )

    def ended(self, pid: int, exit_code: int, status: str) -> None:
        """A process ended; `status` is what its client is told."""
        level = "info" if exit_code == 0 else "warn"
        self._add(
            level,
            f"process {pid} ended: {status}",
            event="process_end",
            pid=str(pid),
            exit_code=str(exit_code),
        )

    def read(self) -> dict[str, object]:
        """`{"entries": [...]}`, oldest first."""
        return {"entries": list(self._entries)}

    def _add(self, level: str, message: str, **fields: str) -> None:
        self._entries.append(
            {
                "unix_ms": time.time_ns() // 1_000_000,
                "level": level,
                "message": message,
                "fields": fields,
            }
        )
        self._lengths.append(len(message))
        self._characters += len(message)
        while len(self._entries) > MOST_ENTRIES or self._characters > MOST_CHARACTERS:
            self._entries.popleft()
            self._characters -= self._lengths.popleft()


def _joined(command: str, arguments: Sequence[str]) -> str:
    return " ".join((command, *arguments))[:_COMMAND_CHARACTERS]
