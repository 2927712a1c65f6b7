"""Short work in a forked child, so that PID 1 never waits: for drivers, disks, the files of a
container that may be wedged.

The child is a copy of the agent with one pipe: it does one function and writes what that returned
or the error it raised, at most `most_bytes`. It stays in the agent's own cgroup, so a frozen or
full container does not hold it up. A child that overruns its deadline is killed, and its answer is
an error even if it hangs where no signal reaches it.
"""

from __future__ import annotations

import os
import signal
from struct import Struct

from vmcell_agent import abi, forked, syscalls
from vmcell_agent.attempt import attempt
from vmcell_agent.eventloop import READABLE
from vmcell_protos.errors import CODES, CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vmcell_agent.eventloop import Loop
    from vmcell_agent.reaper import Reaper

    Work = Callable[[], bytes]
    Done = Callable[[bytes | VmcellError], None]

MAX_ERRANDS = 32
_CHUNK_BYTES = 256 << 10
_ERROR_BYTES = 4096
_HEAD = Struct("=cI")  # what follows, and its length
_RESULT, _ERROR = b"+", b"-"


class Errands:
    """Every errand under way; `close` kills them, and they are not answered."""

    def __init__(self, loop: Loop, reaper: Reaper) -> None:
        self._loop = loop
        self._reaper = reaper
        self._open: set[_Errand] = set()

    def run(
        self,
        what: str,
        work: Work,
        done: Done,
        *,
        seconds: float,
        keep: tuple[int, ...] = (),
        most_bytes: int = 0,
    ) -> None:
        """Call `work` in a child in which only the descriptors `keep` are open; `done` gets what it
        returned or its error, once. Raises CallerError and HostError when there is no child."""
        if len(self._open) >= MAX_ERRANDS:
            raise CallerError(
                f"{what}: {MAX_ERRANDS} such calls are under way already", code="resource_exhausted"
            )
        with attempt(f"{what}: make a process for it"):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            try:
                pid = os.fork()
                if pid == 0:
                    _child(work, write_end, keep)
            except OSError:
                os.close(read_end)
                raise
            finally:
                os.close(write_end)

        def ended(result: bytes | VmcellError) -> None:
            self._open.discard(errand)
            done(result)

        errand = _Errand(self._loop, what, pid, read_end, max(most_bytes, _ERROR_BYTES), ended)
        self._open.add(errand)
        self._reaper.expect(pid, errand.reaped)
        errand.start(seconds)

    def close(self) -> None:
        for errand in self._open:
            errand.stop()
        self._open.clear()


class _Errand:
    """The agent's side of one child."""

    def __init__(
        self, loop: Loop, what: str, pid: int, pipe: int, most_bytes: int, done: Done
    ) -> None:
        self._loop = loop
        self._what = what
        self._pid = pid
        self._pipe = pipe
        self._most_bytes = most_bytes + _HEAD.size
        self._done = done
        self._taken = bytearray()

    def start(self, seconds: float) -> None:
        os.set_blocking(self._pipe, False)
        self._loop.watch(self._pipe, READABLE, self._on_pipe)
        self._timer = self._loop.call_later(seconds, lambda: self._overrun(seconds))

    def reaped(self, wait_status: int) -> None:
        """From here on the pid may be another's."""
        self._pid = 0

    def stop(self) -> None:
        """Kill the child and forget it."""
        self._timer.cancel()
        self._loop.unwatch(self._pipe)
        os.close(self._pipe)
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def _overrun(self, seconds: float) -> None:
        self.stop()
        text = f"{self._what}: not done within {seconds:g} s"
        self._done(HostError(text, code="deadline_exceeded"))

    def _on_pipe(self, events: int) -> None:
        try:
            data = os.read(self._pipe, _CHUNK_BYTES)
        except BlockingIOError:
            return
        self._taken += data
        if data and len(self._taken) <= self._most_bytes:
            return
        self.stop()  # at the end of the pipe there is nothing left to kill
        self._done(self._result())

    def _result(self) -> bytes | VmcellError:
        if len(self._taken) > self._most_bytes:
            return HostError(f"{self._what}: the answer is too long", code="internal")
        killed = HostError(f"{self._what}: the process for it was killed", code="internal")
        if len(self._taken) < _HEAD.size:
            return killed
        kind, length = _HEAD.unpack_from(self._taken)
        rest = bytes(self._taken[_HEAD.size :])
        if len(rest) != length:
            return killed
        if kind == _RESULT:
            return rest
        code, _, text = rest.partition(b"\0")
        name = code.decode("ascii", "replace")
        return HostError(text.decode("utf-8", "replace"), code=name if name in CODES else "unknown")


class _answer:
    """What the child writes: an exception that arrives here, and then it ends."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if isinstance(error, VmcellError):
                _write_error(self._pipe, error.code, str(error))
            elif error is not None:
                _write_error(self._pipe, "internal", f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)


def _child(work: Work, pipe: int, keep: tuple[int, ...]) -> NoReturn:
    with _answer(pipe):
        forked.reset()
        forked.close_all_but(0, 1, 2, pipe, *keep)
        # A copy of the agent goes among a container's files: nobody there may look into it.
        syscalls.prctl(abi.PR_SET_DUMPABLE, 0)
        _write(pipe, _RESULT, work())
    os._exit(0)


def _write(pipe: int, kind: bytes, content: bytes) -> None:
    message = _HEAD.pack(kind, len(content)) + content
    while message:
        message = message[os.write(pipe, message) :]


def _write_error(pipe: int, code: str, text: str) -> None:
    content = code.encode() + b"\0" + text.encode("utf-8", "replace")
    _write(pipe, _ERROR, content[: _ERROR_BYTES - _HEAD.size])
