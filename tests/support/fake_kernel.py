"""A kernel without a process: what a run does is one word, so that a test decides the order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from vmcell_interpreter import lines
from vmcell_interpreter.kernel import KernelFailed
from vmcell_interpreter.lines import Line


class FakeKernel:
    """`vmcell_interpreter.kernel.Kernel`; code is one word of "say", "wait", "deaf", "die".

    "wait" runs until it is interrupted, "deaf" until the kernel is stopped.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.started = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.adopted: list[dict[str, str]] = []
        self.running = 0
        self._ended = ""
        self._interrupted = asyncio.Event()
        self._stopped = asyncio.Event()

    @property
    def ended(self) -> str:
        return self._ended

    async def start(self) -> None:
        await self.may_start.wait()
        if self.fails:
            await self.stop("it fails")
            raise KernelFailed("it fails")
        self.started.set()

    async def adopt(self, environment: Mapping[str, str]) -> None:
        self.adopted.append(dict(environment))

    async def run(self, code: str, environment: Mapping[str, str]) -> AsyncIterator[Line]:
        assert self.started.is_set()
        assert not self.running, "two runs at once"
        self.running += 1
        self._interrupted.clear()
        try:
            yield lines.output("stdout", code, "now")
            if code == "wait":
                await _first(self._interrupted, self._stopped)
            elif code == "deaf":
                await self._stopped.wait()
            elif code == "die":
                await self.stop("it died")
        finally:
            self.running -= 1

    async def interrupt(self) -> None:
        self._interrupted.set()

    async def stop(self, why: str) -> None:
        self._ended = self._ended or why
        self._stopped.set()


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
