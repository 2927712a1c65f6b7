"""The standard streams of one process: containerd's FIFOs on one side, vsock streams on the other.

Output is opened in Create or Exec, so that a bad path is an error there. Input is opened in Start:
until then a client's write blocks, so that it meets the end of its input when it can already say so
by CloseIO (ctr forgets to when its input ends while Create is still running). All that a client
takes is flushed before the exit is reported; what it does not take then (a containerd that is just
being restarted) is kept until it does, or until Delete. The guest gets one vsock stream for each
channel that exists; with a terminal one stream carries both directions.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from errno import ENOTCONN
from socket import SHUT_WR

from vmcell_protos.agent import Streams
from vmcell_protos.errors import HostError
from vmcell_shim.fifo import (
    OutputFifo,
    OutputFile,
    StdinFifo,
    check_stdin,
    open_output,
    open_stdin,
    scheme_of,
)
from vmcell_shim.log_binary import SCHEMES, LogBinary, LogPipe
from vmcell_shim.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    Dial = Callable[[int], socket.socket]
    Output = OutputFifo | OutputFile | LogPipe

# A child in the background may hold stdout for ever.
SILENT_S = 2.0
# A client may have stopped reading, or read slowly; the exit is not held for it any longer.
FULL_S = 2.0
FLUSH_S = 10.0


@dataclass(frozen=True, kw_only=True)
class StreamOwner:
    """Whose streams they are, for logging programs; `warn` takes sentences for the log."""

    namespace: str
    container_id: str
    warn: Callable[[str], None]


class Stdio:
    """Owns FIFOs, logging programs, sockets and pumps of one process until close()."""

    def __init__(
        self, *, stdin: str, stdout: str, stderr: str, terminal: bool, owner: StreamOwner
    ) -> None:
        """Waits for nobody. Raises CallerError."""
        self.stdin_path, self.stdout_path, self.stderr_path = stdin, stdout, stderr
        self.terminal = terminal
        self._owner = owner
        self._lock = threading.Lock()
        self._closed = False
        self._stdin: StdinFifo | None = None
        self._input_ended = False
        self._outputs: dict[str, Output] = {}
        self._loggers: list[LogBinary] = []
        self._pumps: dict[str, Pump] = {}
        self._ids: dict[str, int] = {}
        self._held: list[socket.socket] = []
        try:
            check_stdin(stdin)
            self._open_outputs({"stdout": stdout, "stderr": "" if terminal else stderr})
        except BaseException:
            self.close()
            raise

    def declare(self, next_id: Callable[[], int]) -> Streams:
        """Ids for the channels that exist, as the guest wants to know them beforehand.

        Waits for logging programs to be ready; raises CallerError when one is not.
        """
        for logger in self._loggers:
            logger.wait_ready()
        names = list(self._outputs)
        if self.stdin_path and not self.terminal:
            names.append("stdin")
        self._ids = {name: next_id() for name in names}
        return Streams(
            stdin=self._ids.get("stdin", 0),
            stdout=self._ids.get("stdout", 0),
            stderr=self._ids.get("stderr", 0),
            terminal=self.terminal,
        )

    def join(self, dial: Dial) -> None:
        """Dials one vsock stream for each declared channel and starts moving bytes.

        `dial` gives the connected stream of an id. Raises what `dial` raises, HostError after
        close(). A second call, after a start that failed, joins what the first one did not.
        """
        self._open_input()
        for name, stream_id in self._ids.items():
            if name in self._pumps:
                continue
            stream = dial(stream_id)
            stream.setblocking(False)
            with self._lock:
                if self._closed:
                    stream.close()
                    raise HostError("the process was deleted while it was being started")
                if name == "stdin" or self.terminal:
                    self._pump_input(stream.dup())
                if name == "stdin":
                    # Closing it at the end of input would cut off what is still on its way.
                    self._held.append(stream)
                else:
                    self._pump_output(name, stream)

    def end_input(self) -> None:
        """CloseIO: the guest sees the end of stdin after what is still in the FIFO. Idempotent."""
        with self._lock:
            self._input_ended = True
            if self._stdin is not None:
                self._stdin.end_input()

    def flush(self) -> None:
        """What the process wrote has reached its readers, or waiting for them made no sense; then
        it goes on by itself, until close(). Called once the process has ended."""
        self.end()
        deadline = time.monotonic() + FLUSH_S
        for name, pump in self._pumps.items():
            if name != "stdin":
                pump.wait_moved(full_s=FULL_S, deadline=deadline)

    def end(self) -> None:
        """The process has ended, or will never be started: no more input, and every output ends
        with what is on the way to it. Waits for nobody; idempotent."""
        for name, pump in self._pumps.items():
            if name == "stdin":
                pump.stop()
            else:
                pump.finish(SILENT_S)
        self._close_unpumped()

    def close(self) -> None:
        """Ends all at once, and waits until logging programs are gone. Idempotent."""
        with self._lock:
            self._closed = True
        for pump in self._pumps.values():
            pump.stop()
        for output in self._outputs.values():
            output.give_up()
        for pump in self._pumps.values():
            pump.wait_end(1.0)
        self._close_unpumped()
        for stream in self._held:
            stream.close()
        for logger in self._loggers:
            logger.close()

    def _close_unpumped(self) -> None:
        with self._lock:
            if self._stdin is not None and "stdin" not in self._pumps:
                self._stdin.close()
            for name, output in self._outputs.items():
                if name not in self._pumps:
                    output.close()

    def _open_outputs(self, targets: dict[str, str]) -> None:
        for name, target in targets.items():
            if name in self._outputs:
                continue
            if scheme_of(target) in SCHEMES:
                self._run_logger(target, tuple(key for key in targets if targets[key] == target))
            elif output := open_output(name, target):
                self._outputs[name] = output
        if self.terminal and not self._outputs:
            # Nobody listens, but the guest's terminal must not fill up.
            self._outputs["stdout"] = OutputFile(os.devnull)

    def _run_logger(self, uri: str, streams: tuple[str, ...]) -> None:
        logger = LogBinary(
            uri,
            streams,
            container_id=self._owner.container_id,
            namespace=self._owner.namespace,
            warn=self._owner.warn,
        )
        self._loggers.append(logger)
        self._outputs |= logger.pipes

    def _open_input(self) -> None:
        with self._lock:
            if self._stdin is None and not self._closed:
                self._stdin = open_stdin(self.stdin_path)
            if self._stdin is not None and self._input_ended:
                self._stdin.end_input()

    def _pump_input(self, stream: socket.socket) -> None:
        fifo = self._stdin
        if fifo is None:
            stream.close()
            return

        def end() -> None:
            with self._lock:
                fifo.close()
            # A terminal has no end of input; its stream also carries the output.
            if not self.terminal:
                _half_close(stream)
            stream.close()

        self._start("stdin", Pump(fifo.fd, stream.fileno(), splice=True, on_end=end, name="stdin"))

    def _pump_output(self, name: str, stream: socket.socket) -> None:
        output = self._outputs[name]

        def end() -> None:
            stream.close()
            if not output.let_go():
                pump.moved.set()
                output.linger()

        pump = Pump(
            stream.fileno(),
            output.fd,
            splice=output.is_pipe,
            on_end=end,
            name=name,
            drain=lambda why: self._owner.warn(f"{name} of {self._owner.container_id}: {why}"),
        )
        self._start(name, pump)

    def _start(self, name: str, pump: Pump) -> None:
        self._pumps[name] = pump
        pump.start()


def _half_close(stream: socket.socket) -> None:
    try:
        stream.shutdown(SHUT_WR)
    except OSError as error:
        if error.errno != ENOTCONN:  # the guest has closed its end already
            raise
