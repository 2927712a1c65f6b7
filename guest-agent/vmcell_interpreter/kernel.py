"""What a kernel is to the contexts: a process that runs code and says lines about it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from .lines import Line


class KernelFailed(Exception):
    """A kernel that did not start, or cannot go on; the text says why."""


class Kernel(Protocol):
    """One process. `start` once, then one `run` at a time; `stop` ends it from any state.

    `ended` says why the kernel is no more, "" while it lives; a `run` then stops without its end.
    """

    @property
    def ended(self) -> str: ...

    async def start(self) -> None:
        """Returns when it takes code; raises KernelFailed."""

    async def adopt(self, environment: Mapping[str, str]) -> None:
        """Sets variables for all runs to come."""

    def run(self, code: str, environment: Mapping[str, str]) -> AsyncIterator[Line]:
        """The lines of one run, without keepalives and the end; `environment` is for it alone."""

    async def interrupt(self) -> None:
        """Asks the running code to stop; its `run` then comes to its end, if it listens."""

    async def stop(self, why: str) -> None:
        """Kills the process; idempotent. Whoever waits in `run` comes back."""
