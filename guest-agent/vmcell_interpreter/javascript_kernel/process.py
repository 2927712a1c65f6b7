"""`vmcell_interpreter.kernel.Kernel` by Node: three pipes to the driver, JSON a line on each.

Node is not spoken to by Jupyter's protocol: the kernels there are for it are unkept or need a
compiler, and a wrapper would cost a second interpreter's start.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmcell_interpreter import lines, mime
from vmcell_interpreter.kernel import KernelFailed
from vmcell_interpreter.lines import Line

log = logging.getLogger("vmcell.interpreter")

NODE = "node"
DRIVER = Path(__file__).with_name("driver.js")
START_S = 60.0
# A message is one line; a result may be a picture.
MAX_MESSAGE_BYTES = 256 << 20
PIPE_BYTES = 1 << 16
# Debian's modules, acorn and typescript among them, stand beside and not below us.
DEBIAN_MODULES = "/usr/share/nodejs"

Message = dict[str, Any]


class JavascriptKernel:
    """One Node process; `typescript`: code loses its types first."""

    def __init__(self, *, cwd: str, environment: Mapping[str, str], typescript: bool) -> None:
        self._cwd = cwd
        self._environment = dict(environment)
        self._typescript = typescript
        self._process: asyncio.subprocess.Process | None = None
        self._requests: asyncio.StreamWriter | None = None
        self._stops = -1
        self._outputs: list[Output] = []
        self._reader: asyncio.Task[None] | None = None
        self._heard: asyncio.Queue[Message | None] = asyncio.Queue()
        self._run_id = 0
        self._ended = ""

    @property
    def ended(self) -> str:
        """Why the process is no more."""
        return self._ended

    async def start(self) -> None:
        """Starts Node and waits for its driver; raises KernelFailed."""
        if not os.path.isdir(self._cwd):
            raise KernelFailed(f"The directory {self._cwd!r} does not exist")
        try:
            await self._launch()
            async with asyncio.timeout(START_S):
                while (heard := await self._heard.get()) is not None:
                    if heard["type"] == "ready":
                        return
        except TimeoutError:
            await self.stop(f"Node did not answer in {START_S} s")
        except OSError as error:
            await self.stop(f"Node did not start: {error}")
        raise KernelFailed(self._ended)

    async def adopt(self, environment: Mapping[str, str]) -> None:
        """Sets variables for all runs to come."""
        self._ask({"type": "adopt", "environment": dict(environment)})

    async def run(self, code: str, environment: Mapping[str, str]) -> AsyncIterator[Line]:
        """The lines of one run."""
        if self._ended:
            return
        self._run_id += 1
        self._ask(
            {
                "type": "run",
                "id": self._run_id,
                "code": code,
                "environment": dict(environment),
                "typescript": self._typescript,
            }
        )
        while (heard := await self._heard.get()) is not None:
            if heard["type"] == "end":
                if heard["id"] == self._run_id:
                    return
                continue
            line = said(heard)
            if line is not None:
                yield line
        self._heard.put_nowait(None)

    async def interrupt(self) -> None:
        """Ends a run that waits, and one that is busy."""
        if not self._ended:
            self._ask({"type": "interrupt", "id": self._run_id})
            with suppress(BlockingIOError):
                os.write(self._stops, b".")

    async def stop(self, why: str) -> None:
        """Kills Node and what it has started in its process group."""
        first, self._ended = not self._ended, self._ended or why
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if first:
            self._close()

    async def _launch(self) -> None:
        requests, messages, stops = os.pipe(), os.pipe(), os.pipe()
        out, err = os.pipe(), os.pipe()
        theirs = (requests[0], messages[1], stops[0])
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(NODE, str(DRIVER), *map(str, theirs)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out[1],
                stderr=err[1],
                cwd=self._cwd,
                env={**self._environment, "NODE_PATH": self._module_path()},
                pass_fds=theirs,
                start_new_session=True,
            )
        except OSError:
            for descriptor in (requests[1], messages[0], stops[1], out[0], err[0]):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (*theirs, out[1], err[1]):
                os.close(descriptor)
        self._stops = stops[1]
        os.set_blocking(self._stops, False)
        self._requests = await _writer(requests[1])
        said_by_driver = await _reader(messages[0])
        hear = self._heard.put_nowait
        self._outputs = [Output("stdout", out[0], hear), Output("stderr", err[0], hear)]
        self._reader = asyncio.create_task(self._read_messages(said_by_driver))

    def _module_path(self) -> str:
        given = self._environment.get("NODE_PATH")
        return f"{given}:{DEBIAN_MODULES}" if given else DEBIAN_MODULES

    def _ask(self, request: Message) -> None:
        if self._requests is not None and not self._ended:
            self._requests.write(json.dumps(request).encode() + b"\n")

    async def _read_messages(self, reader: asyncio.StreamReader) -> None:
        """Until the driver is gone: its end of the pipe closes when Node ends."""
        while row := await reader.readline():
            message = json.loads(row)
            if message["type"] == "end":
                # What children of the run have printed stands in the other pipes already.
                for output in self._outputs:
                    output.take()
            self._heard.put_nowait(message)
        if not self._ended:
            assert self._process is not None
            log.warning("node has died")
            self._ended = "The javascript kernel has died; its variables are lost"
            self._close()

    def _close(self) -> None:
        if self._requests is not None:
            self._requests.close()
        if self._stops >= 0:
            os.close(self._stops)
            self._stops = -1
        for output in self._outputs:
            output.take()
            output.close()
        self._heard.put_nowait(None)
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()


class Output:
    """What Node's children, or Node itself in need, print past the driver, while the loop runs.

    Owns `descriptor`; each piece goes to `hear` as a message like the driver's.
    """

    def __init__(self, name: str, descriptor: int, hear: Callable[[Message], None]) -> None:
        self._name = name
        self._descriptor = descriptor
        self._hear = hear
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self.take)

    def take(self) -> None:
        """What stands in the pipe now, and no more than a pipe holds."""
        if self._descriptor < 0:
            return
        try:
            piece = os.read(self._descriptor, PIPE_BYTES)
        except BlockingIOError:
            return
        if text := self._decoder.decode(piece):
            self._hear({"type": self._name, "text": text})
        if not piece:
            self.close()

    def close(self) -> None:
        """Reads no more. Idempotent."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def said(message: Message) -> Line | None:
    """The line for a message of the driver, None for one that clients do not see."""
    kind = message["type"]
    if kind in ("stdout", "stderr"):
        return lines.output(kind, message["text"], datetime.now(UTC).isoformat())
    if kind == "result":
        return mime.result(message["bundle"], is_main=message["main"])
    if kind == "count":
        return lines.executions(message["count"])
    if kind == "error":
        return lines.error(message["name"], message["value"], message["traceback"])
    return None


async def _reader(descriptor: int) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_MESSAGE_BYTES)
    file = os.fdopen(descriptor, "rb", buffering=0)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader


async def _writer(descriptor: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    file = os.fdopen(descriptor, "wb", buffering=0)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, file)
    return asyncio.StreamWriter(transport, protocol, None, loop)
