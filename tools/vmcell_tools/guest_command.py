"""A command in a sandbox: its output passed on as it comes, its input as it is taken, its end."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vmcell_agent.envd.wire.envelope import FLAG_END_STREAM, EnvelopeDecoder
from vmcell_agent.envd.wire.gotext import exit_text
from vmcell_protos.errors import CODES, CallerError, HostError, VmcellError
from vmcell_tools.api_client import Json
from vmcell_tools.envd_door import KEEPALIVE_S, Door
from vmcell_tools.local_terminal import Size

# A stream that is silent for so long is lost.
SILENT_S = 4 * KEEPALIVE_S
PIECE_BYTES = 1 << 16
MAX_FRAME_BYTES = 64 << 20
NOT_FOUND_STATUS, NOT_STARTED_STATUS, TIMEOUT_STATUS = 127, 126, 124


class CommandError(VmcellError):
    """The command did not run, or not to its end; `exit_status` is what shells use for that."""

    default_code = "unknown"

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class OutputError(HostError):
    """Standard output or error takes no more: a full disk, a terminal that has gone."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run, as whom and where: "" is envd's default; `with_stdin`: it has an input;
    `terminal`: it has one of that size, for input and all output."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = ""
    user: str = ""
    timeout_s: int | None = None
    with_stdin: bool = False
    terminal: Size | None = None

    def message(self) -> Json:
        """process.StartRequest."""
        program, *arguments = self.words
        process: Json = {"cmd": program, "args": arguments, "envs": self.environment}
        if self.directory:
            process["cwd"] = self.directory
        message: Json = {"process": process, "stdin": self.with_stdin}
        if self.terminal is not None:
            message["pty"] = _size(self.terminal)
        return message


class Sink(Protocol):
    """Where output goes."""

    def write(self, data: bytes, /) -> Any: ...

    def flush(self) -> None: ...


class RunningCommand:
    """A command from its start on; `run` returns when it has ended. `terminate` may be called by
    a signal's handler or another thread meanwhile."""

    def __init__(self, door: Door, command: Command) -> None:
        user = {}
        if command.user:
            word = base64.b64encode(f"{command.user}:".encode()).decode()
            user = {"Authorization": f"Basic {word}"}
        self._door = Door(url=door.url, headers={**door.headers, **user})
        self._command = command
        self._asked_to_end = 0
        self._input_error: VmcellError | None = None
        self.pid = 0

    def run(self, *, stdin: Callable[[], bytes] | None, stdout: Sink, stderr: Sink) -> int:
        """The exit status, 128 + its number for a signal.

        `stdin` waits for a piece of input, b"" at its end. A sink that fails ends the command:
        BrokenPipeError, or OutputError.
        """
        connection = self._door.connect(SILENT_S)
        try:
            sinks = {"stdout": stdout, "stderr": stderr, "pty": stdout}
            return self._follow(connection, stdin, sinks)
        except BrokenPipeError:
            self.terminate()
            raise
        except OSError as error:  # those of connections have become HostErrors
            self.terminate()
            raise OutputError(
                f"the output cannot be written, so the command was ended: {error}"
            ) from error
        finally:
            connection.close()

    def terminate(self) -> None:
        """SIGTERM to the command, SIGKILL from the second time on; it may have ended already."""
        self._asked_to_end += 1
        word = "SIGNAL_SIGTERM" if self._asked_to_end == 1 else "SIGNAL_SIGKILL"
        message = {"process": {"pid": self.pid}, "signal": word}
        try:
            self._door.call("SendSignal", message)
        except CallerError as error:
            if error.code != "not_found":
                raise

    def resize(self, size: Size) -> None:
        """Tells the command of a new size of its terminal."""
        with contextlib.suppress(CallerError):  # it has ended
            self._door.call("Update", {"process": {"pid": self.pid}, "pty": _size(size)})

    def _follow(
        self,
        connection: http.client.HTTPConnection,
        stdin: Callable[[], bytes] | None,
        sinks: dict[str, Sink],
    ) -> int:
        timeout_s = self._command.timeout_s
        headers = {} if timeout_s is None else {"Connect-Timeout-Ms": str(timeout_s * 1000)}
        response = self._door.stream(connection, self._command.message(), headers)
        status = None
        for kind, found in self._events(response):
            if kind == "start":
                self.pid = found
                if stdin is not None:
                    threading.Thread(target=self._feed, args=(stdin,), daemon=True).start()
            elif kind == "end":
                status = found
            else:
                sinks[kind].write(found)
                sinks[kind].flush()
        if self._input_error is not None:
            raise self._input_error
        if status is None:
            raise HostError("envd ended the stream without the command's end; it may run on")
        return status

    def _events(self, response: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
        """(start, pid), (stdout, stderr or pty, bytes), (end, exit status) as they come; raises
        what the stream's end tells."""
        decoder = EnvelopeDecoder(MAX_FRAME_BYTES)
        while True:
            try:
                chunk = response.read1(PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise HostError(f"{self._where()} broke off: {error}; it may run on") from error
            if not chunk:
                raise HostError(f"{self._where()} broke off; it may run on")
            for flags, payload in decoder.feed(chunk):
                try:
                    message = json.loads(payload)
                    if flags & FLAG_END_STREAM:
                        self._check_end(message)
                        return
                    events = list(_facts(message["event"]))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise HostError(f"{self._where()} holds what no envd says: {error}") from error
                yield from events

    def _check_end(self, message: Json) -> None:
        error = message.get("error")
        if not error:
            return
        code, words = str(error.get("code")), str(error.get("message"))
        if code == "deadline_exceeded":
            own_s = self._command.timeout_s
            after = "by the server" if own_s is None else f"after {own_s} s"
            raise CommandError(f"the command was ended {after}", TIMEOUT_STATUS)
        if words.startswith("error starting process"):
            is_absent = "not found" in words or "no such file" in words.lower()
            raise CommandError(words, NOT_FOUND_STATUS if is_absent else NOT_STARTED_STATUS)
        raise CallerError(words, code=code if code in CODES else None)

    def _where(self) -> str:
        return f"the stream of command {self.pid}" if self.pid else "the stream of the command"

    def _feed(self, stdin: Callable[[], bytes]) -> None:
        """Passes the input on, in order, no faster than the command takes it."""
        process = {"pid": self.pid}
        kind = "stdin" if self._command.terminal is None else "pty"
        try:
            while piece := stdin():
                data = {kind: base64.b64encode(piece).decode()}
                self._door.call("SendInput", {"process": process, "input": data})
            if kind == "stdin":
                self._door.call("CloseStdin", {"process": process})
            else:  # our terminal has gone, and a terminal has no end of input
                self.terminate()
        except (VmcellError, OSError) as error:
            # What a command does not read is no error, as with a pipe.
            if "writing to stdin" in str(error) or getattr(error, "code", "") == "not_found":
                return
            self._input_error = HostError(f"the input broke off, so the command was ended: {error}")
            with contextlib.suppress(VmcellError):  # the stream's own end says so too
                self.terminate()


def _facts(event: Json) -> Iterator[tuple[str, Any]]:
    """What one process.ProcessEvent tells; keepalives tell nothing."""
    if "start" in event:
        yield "start", int(event["start"]["pid"])
    for name in ("stdout", "stderr", "pty"):
        if text := (event.get("data") or {}).get(name):
            yield name, base64.b64decode(text, validate=True)
    if "end" in event:
        yield "end", _exit_status(event["end"])


def _size(size: Size) -> Json:
    """process.PTY."""
    return {"size": {"cols": size.columns, "rows": size.rows}}


def _exit_status(end: Json) -> int:
    words = str(end.get("status", "")).removesuffix(" (core dumped)")
    if not words.startswith("signal: "):
        return int(end.get("exitCode", 0)) & 0xFF
    return 128 + next((n for n in range(1, signal.NSIG) if exit_text(n).status == words), 0)
