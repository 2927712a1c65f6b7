"""A context: a language, a directory and a kernel with the state of all runs so far.

Runs wait for each other. The kernel is started when it is first needed and again after its death.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable

from . import lines
from .client import Client
from .kernel import Kernel, KernelFailed
from .requests import ExecuteRequest

log = logging.getLogger("vmcell.interpreter")

# A kernel that is told to stop and does not is killed, with its state, after so many seconds. It
# is told once a second: code that has not begun when it is told does not hear it.
INTERRUPTS = 10
INTERRUPT_EVERY_S = 1.0

MakeKernel = Callable[[], Kernel]
# Takes the client's access token; the sandbox's global environment.
ReadEnvironment = Callable[[str | None], Awaitable[dict[str, str]]]


class Context:
    """One context; `id` is what clients know it by."""

    def __init__(
        self,
        *,
        language: str,
        cwd: str,
        make_kernel: MakeKernel,
        read_environment: ReadEnvironment,
    ) -> None:
        self.id = str(uuid.uuid4())
        self.language = language
        self.cwd = cwd
        self._make_kernel = make_kernel
        self._read_environment = read_environment
        self._lock = asyncio.Lock()
        self._launch: asyncio.Task[Kernel] | None = None
        # The kernel that has the sandbox's environment.
        self._adopted: Kernel | None = None
        self._removed = False

    def described(self) -> dict[str, str]:
        """The object that clients are shown."""
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    async def ready(self) -> Kernel:
        """A kernel that takes code, started if need be; raises KernelFailed.

        A caller that gives up waiting does not end the start.
        """
        if self._launch is None or _useless(self._launch):
            self._launch = asyncio.create_task(self._start_kernel())
        return await asyncio.shield(self._launch)

    async def run(self, request: ExecuteRequest, client: Client, token: str | None) -> None:
        """Runs code for `client` when it is its turn; raises ClientGone, the kernel interrupted."""
        await client.wait(self._lock.acquire())
        try:
            await self._run_now(request, client, token)
        except KernelFailed as error:
            await client.send(lines.error("UnexpectedEndOfExecution", str(error), ""))
        finally:
            self._lock.release()
        await client.send(lines.END)

    async def restart(self) -> None:
        """A new kernel without the old one's state; a run that goes on ends with an error."""
        await self._stop_kernel("Context was restarted")
        await self.ready()

    async def remove(self) -> None:
        """Ends the kernel for good; a run that goes on ends with an error."""
        self._removed = True
        await self._stop_kernel("Context was removed")

    async def _start_kernel(self) -> Kernel:
        if self._removed:
            raise KernelFailed("Context was removed")
        kernel = self._make_kernel()
        await kernel.start()
        return kernel

    async def _stop_kernel(self, why: str) -> None:
        launch, self._launch = self._launch, None
        if launch is None:
            return
        try:
            kernel = await launch
        except KernelFailed:
            return
        await kernel.stop(why)

    async def _run_now(self, request: ExecuteRequest, client: Client, token: str | None) -> None:
        kernel = await client.wait(self.ready())
        if self._adopted is not kernel:
            await client.wait(self._adopt(kernel, token))
        told: asyncio.Queue[lines.Line | None] = asyncio.Queue()
        run = asyncio.create_task(_tell(kernel, request, told))
        try:
            while (line := await client.wait(told.get())) is not None:
                await client.send(line)
        finally:
            if not run.done():
                await self._interrupt(kernel, run)
        await run
        if kernel.ended:
            await client.send(lines.error("ContextRestarting", kernel.ended, ""))

    async def _adopt(self, kernel: Kernel, token: str | None) -> None:
        """Once for each kernel, at its first run: only then a client shows the token."""
        environment = await self._read_environment(token)
        if environment:
            await kernel.adopt(environment)
        self._adopted = kernel

    async def _interrupt(self, kernel: Kernel, run: asyncio.Task[None]) -> None:
        for _ in range(INTERRUPTS):
            await kernel.interrupt()
            done, _ = await asyncio.wait({run}, timeout=INTERRUPT_EVERY_S)
            if done:
                return
        log.warning("context %s did not stop when interrupted; its kernel is killed", self.id)
        await kernel.stop("The kernel did not stop when it was interrupted, and was killed")
        await run


def _useless(launch: asyncio.Task[Kernel]) -> bool:
    """Whether a start has failed, or its kernel is no more."""
    if not launch.done():
        return False
    return launch.cancelled() or launch.exception() is not None or bool(launch.result().ended)


async def _tell(
    kernel: Kernel, request: ExecuteRequest, told: asyncio.Queue[lines.Line | None]
) -> None:
    """Passes a run's lines on, None after the last; never waits for a slow client.

    What the queue holds is the sandbox's own memory. A kernel whose lines are not taken at once
    would drop some (ZeroMQ's PUB sockets do).
    """
    try:
        async for line in kernel.run(request.code, request.environment):
            told.put_nowait(line)
    finally:
        told.put_nowait(None)
