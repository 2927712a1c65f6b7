"""The standard streams of one process: containerd's FIFOs on one side, vsock streams on the other.

Output is opened in Create or Exec, so that a bad path is an error there. Input is opened in Start:
until then a client's write blocks, so that it meets the end of its input when it can already say so
by CloseIO (ctr forgets to when its input ends while Create is still running). All is flushed before
the exit is reported. The guest gets one vsock stream for each channel that exists; with a terminal
one stream carries both directions.
"""

from __future__ import annotations

import os
import threading
from errno import ENOTCONN
from socket import SHUT_WR

from vmcell_protos.agent import Streams
from vmcell_shim.fifo import (
    Output,
    OutputFile,
    StdinFifo,
    check_stdin,
    open_output,
    open_stdin,
)
from vmcell_shim.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    Dial = Callable[[int], socket.socket]

# A child in the background may hold stdout for ever; a client may have stopped reading.
SILENT_S = 2.0
FULL_S = 10.0
# A client may still be opening its end when a short process has ended already.
READER_S = 0.5


class Stdio:
    """Owns FIFOs, sockets and pumps of one process until close()."""

    def __init__(self, *, stdin: str, stdout: str, stderr: str, terminal: bool) -> None:
        self.stdin_path, self.stdout_path, self.stderr_path = stdin, stdout, stderr
        self.terminal = terminal
        self._lock = threading.Lock()
        self._stdin: StdinFifo | None = None
        self._input_ended = False
        self._outputs: dict[str, Output] = {}
        self._pumps: dict[str, Pump] = {}
        self._ids: dict[str, int] = {}
        self._sockets: list[socket.socket] = []
        try:
            check_stdin(stdin)
            for name, target in (("stdout", stdout), ("stderr", "" if terminal else stderr)):
                output = open_output(name, target)
                if output is not None:
                    self._outputs[name] = output
            if terminal and not self._outputs:
                # Nobody listens, but the guest's terminal must not fill up.
                self._outputs["stdout"] = OutputFile(os.devnull)
        except BaseException:
            self.close()
            raise

    def declare(self, next_id: Callable[[], int]) -> Streams:
        """Ids for the channels that exist, as the guest wants to know them beforehand."""
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

        `dial` gives the connected stream of an id. Raises what `dial` raises. A second call, after
        a start that failed, joins what the first one did not.
        """
        self._open_input()
        for name, stream_id in self._ids.items():
            if name in self._pumps:
                continue
            stream = dial(stream_id)
            stream.setblocking(False)
            self._sockets.append(stream)
            if name != "stdin":
                self._pump_output(name, stream)
            if name == "stdin" or self.terminal:
                self._pump_input(stream)

    def end_input(self) -> None:
        """CloseIO: the guest sees the end of stdin after what is still in the FIFO. Idempotent."""
        with self._lock:
            self._input_ended = True
            if self._stdin is not None:
                self._stdin.end_input()

    def flush(self) -> None:
        """Everything the guest wrote has reached the FIFOs, or waiting for it made no sense; then
        all is closed. Called once the process has ended."""
        for name, pump in self._pumps.items():
            if name == "stdin":
                pump.stop()
                continue
            if not pump.wait_end(READER_S):
                self._outputs[name].forget_reader()
            pump.wait_quiet(silent_s=SILENT_S, full_s=FULL_S)
        self.close()

    def close(self) -> None:
        """Ends all at once. Idempotent."""
        for pump in self._pumps.values():
            pump.stop()
        for pump in self._pumps.values():
            pump.wait_end(1.0)
        with self._lock:
            if self._stdin is not None and "stdin" not in self._pumps:
                self._stdin.close()
            for name, output in self._outputs.items():
                if name not in self._pumps:
                    output.close()
            for stream in self._sockets:
                stream.close()

    def _open_input(self) -> None:
        with self._lock:
            if self._stdin is None:
                self._stdin = open_stdin(self.stdin_path)
            if self._stdin is not None and self._input_ended:
                self._stdin.end_input()

    def _pump_input(self, stream: socket.socket) -> None:
        fifo = self._stdin
        if fifo is None:
            return

        def end() -> None:
            with self._lock:
                fifo.close()
                # A terminal has no end of input; its stream also carries the output.
                if not self.terminal and stream.fileno() >= 0:
                    _half_close(stream)

        self._start("stdin", Pump(fifo.fd, stream.fileno(), splice=True, on_end=end, name="stdin"))

    def _pump_output(self, name: str, stream: socket.socket) -> None:
        output = self._outputs[name]

        def end() -> None:
            output.wait_reader(READER_S)
            with self._lock:
                output.close()

        pump = Pump(stream.fileno(), output.fd, splice=output.is_pipe, on_end=end, name=name)
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
