"""A kernel that speaks Jupyter's protocol, over unix sockets that only root reaches.

Source: Jupyter's messaging protocol 5.3. A run is over when its reply has come on the shell channel
and "idle" on the publishing one; a kernel that publishes faster than it is read may drop the
latter, so silence after the reply is enough too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from . import lines, mime
from .kernel import KernelFailed
from .lines import Line

log = logging.getLogger("vmcell.interpreter")

START_S = 120.0
# Kernels that were busy importing have been seen to miss the first question.
ASK_AGAIN_S = 2.0
SILENCE_S = 5.0

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class KernelProgram:
    """How a kernel is started, and how it is told about variables.

    `enter` and `leave` give the code that sets variables for one run and puts the old ones back;
    `adopt` sets them for good. `prepare` is code that is run before all else.
    """

    argv: tuple[str, ...]
    language: str
    adopt: Callable[[Mapping[str, str]], str]
    enter: Callable[[Mapping[str, str]], str]
    leave: Callable[[Mapping[str, str]], str]
    prepare: str = ""


class SpecifiedManager(AsyncKernelManager):
    """A manager that is told its kernel's command instead of looking for an installed one."""

    given_spec: KernelSpec

    @property
    def kernel_spec(self) -> KernelSpec:
        """The command and its language."""
        return self.given_spec


class JupyterKernel:
    """`vmcell_interpreter.kernel.Kernel` by jupyter_client; `environment` is the process's own."""

    def __init__(self, program: KernelProgram, *, cwd: str, environment: Mapping[str, str]) -> None:
        self._program = program
        self._cwd = cwd
        self._environment = dict(environment)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._manager: SpecifiedManager | None = None
        self._client: AsyncKernelClient | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._pidfd = -1
        # What the kernel says, channel first; None when it is no more.
        self._heard: asyncio.Queue[tuple[str, Message] | None] = asyncio.Queue()
        self._ended = ""

    @property
    def ended(self) -> str:
        """Why the kernel is no more."""
        return self._ended

    async def start(self) -> None:
        """Starts the process and waits until it publishes; raises KernelFailed."""
        if not os.path.isdir(self._cwd):
            raise KernelFailed(f"The directory {self._cwd!r} does not exist")
        try:
            await self._launch()
            async with asyncio.timeout(START_S):
                await self._answered()
                if self._program.prepare:
                    await self._run_silently(self._program.prepare)
        except TimeoutError:
            await self.stop(f"The {self._program.language} kernel did not answer in {START_S} s")
            raise KernelFailed(self._ended) from None
        except KernelFailed as error:
            await self.stop(str(error))
            raise
        except (OSError, RuntimeError) as error:
            await self.stop(f"The {self._program.language} kernel did not start: {error}")
            raise KernelFailed(self._ended) from error

    async def adopt(self, environment: Mapping[str, str]) -> None:
        """Sets variables for all runs to come."""
        await self._run_silently(self._program.adopt(environment))

    async def run(self, code: str, environment: Mapping[str, str]) -> AsyncIterator[Line]:
        """The lines of one run."""
        if environment:
            await self._run_silently(self._program.enter(environment))
        async for channel, message in self._conversation(code, silent=False):
            line = published(message) if channel == "iopub" else replied(message)
            if line is not None:
                yield line
        if environment and not self._ended:
            await self._run_silently(self._program.leave(environment))

    async def interrupt(self) -> None:
        """SIGINT, to the kernel and what it has started."""
        if self._manager is not None and not self._ended:
            await self._manager.interrupt_kernel()

    async def stop(self, why: str) -> None:
        """Kills the kernel's process group."""
        first, self._ended = not self._ended, self._ended or why
        if not first:
            return
        manager, self._manager = self._manager, None
        if manager is not None and manager.has_kernel:
            await manager.shutdown_kernel(now=True)
        self._close()

    async def _launch(self) -> None:
        program = self._program
        self._folder = tempfile.TemporaryDirectory(prefix="vmcell-kernel-")
        context = zmq.asyncio.Context.instance()
        # the server's memory is the place for what is not read yet, not the socket's end
        context.setsockopt(zmq.RCVHWM, 0)
        manager = self._manager = SpecifiedManager(
            context=context,
            transport="ipc",
            connection_file=os.path.join(self._folder.name, "kernel.json"),
        )
        manager.given_spec = KernelSpec(argv=[*program.argv], language=program.language)
        await manager.start_kernel(cwd=self._cwd, env=self._environment)
        self._watch(manager.provisioner.pid)
        client = self._client = manager.client()
        client.start_channels(stdin=False, hb=False)
        for name, read in (("iopub", client.get_iopub_msg), ("shell", client.get_shell_msg)):
            self._readers.append(asyncio.create_task(self._read(name, read)))

    def _watch(self, pid: int) -> None:
        """Notices the end of the process when it happens."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._died()
            return
        asyncio.get_running_loop().add_reader(self._pidfd, self._died)

    def _died(self) -> None:
        if self._ended:
            return
        log.warning("the %s kernel has died", self._program.language)
        self._ended = f"The {self._program.language} kernel has died; its variables are lost"
        if self._manager is not None:
            self._manager.provisioner.process.poll()  # or it would stay a zombie
            self._manager = None
        self._close()

    def _close(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        for reader in self._readers:
            reader.cancel()
        if self._client is not None:
            self._client.stop_channels()
        self._heard.put_nowait(None)
        if self._folder is not None:
            with suppress(OSError):
                self._folder.cleanup()

    async def _read(self, channel: str, read: Any) -> None:
        while True:
            self._heard.put_nowait((channel, await read()))

    async def _ask(self, kind: str, content: dict[str, Any]) -> str:
        """Sends a request on the shell channel; the id that answers to it carry.

        Not by `AsyncKernelClient.execute`: it sends past the asyncio socket. ZeroMQ tells of an
        arrival once (zmq_getsockopt(3), ZMQ_FD), and a send takes that notice in; where an answer
        came at the moment of such a send, nobody reads the socket ever again.
        """
        assert self._client is not None
        session, socket = self._client.session, self._client.shell_channel.socket
        message = session.msg(kind, content)
        await socket.send_multipart(session.serialize(message))
        return str(message["header"]["msg_id"])

    async def _answered(self) -> None:
        """Asks for its info until both channels have carried something."""
        missing = {"iopub", "shell"}
        while missing:
            await self._ask("kernel_info_request", {})
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    while missing:
                        heard = await self._heard.get()
                        if heard is None:
                            raise RuntimeError(self._ended)
                        missing.discard(heard[0])

    async def _run_silently(self, code: str) -> None:
        """Our own code: it leaves no trace in the counter, and says nothing unless it fails."""
        async for channel, message in self._conversation(code, silent=True):
            content = message["content"]
            if channel == "shell" and content.get("status") == "error":
                raise KernelFailed(f"The environment could not be set: {content.get('evalue')}")

    async def _conversation(self, code: str, *, silent: bool) -> AsyncIterator[tuple[str, Message]]:
        """What the kernel says about one run, until it is over or the kernel is."""
        if self._ended or self._client is None:
            return
        asked = await self._ask(
            "execute_request",
            {
                "code": code,
                "silent": silent,
                "store_history": not silent,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": True,
            },
        )
        idle = answered = False
        while not (idle and answered):
            try:
                async with asyncio.timeout(SILENCE_S if answered else None):
                    heard = await self._heard.get()
            except TimeoutError:
                log.warning("a kernel published no idle after its reply")
                return
            if heard is None:
                self._heard.put_nowait(None)
                return
            channel, message = heard
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            idle |= kind == "status" and content.get("execution_state") == "idle"
            answered |= channel == "shell"
            yield channel, message


def published(message: Message) -> Line | None:
    """The line for a message of the publishing channel, None for one that clients do not see."""
    kind, content = message["header"]["msg_type"], message["content"]
    if kind == "stream" and content["name"] in ("stdout", "stderr"):
        return lines.output(content["name"], content["text"], _timestamp(message))
    if kind in ("execute_result", "display_data"):
        return mime.result(content["data"], is_main=kind == "execute_result")
    if kind == "execute_input":
        return lines.executions(content["execution_count"])
    if kind == "error":
        return lines.error(content["ename"], content["evalue"], "\n".join(content["traceback"]))
    return None


def replied(message: Message) -> Line | None:
    """The line for a reply: only an aborted run has one, the rest was published."""
    if message["content"].get("status") in ("aborted", "abort"):
        return lines.error("ExecutionAborted", "Execution was aborted", "")
    return None


def _timestamp(message: Message) -> str:
    date = message["header"]["date"]
    return str(date if isinstance(date, str) else date.isoformat())
