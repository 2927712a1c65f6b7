"""Run a program to its end and collect what it said, without importing subprocess.

Why not subprocess: 10 ms of import in every shim. posix_spawn also never runs our code between
fork and exec, so threads do not matter. The child gets /dev/null as stdin, default SIGPIPE, and
stdout and stderr in one pipe; Python's descriptors are close-on-exec.
"""

from __future__ import annotations

import os
import select
import signal
import time

_OUTPUT_LIMIT_BYTES = 64 << 10


def run_program(
    arguments: list[str], *, timeout_s: float, stdin: bytes | None = None
) -> tuple[int, str]:
    """(exit status, what it printed, at most 64 KiB) of the program named by `arguments[0]`.

    A status of 128 + n is death by signal n; a program that overruns `timeout_s` is killed. Raises
    FileNotFoundError when PATH has no such program. `stdin` at most one pipe buffer (64 KiB).
    """
    output_end, child_output = os.pipe()
    child_input = _input_end(stdin)
    try:
        pid = os.posix_spawnp(
            arguments[0],
            arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, child_input, 0),
                (os.POSIX_SPAWN_DUP2, child_output, 1),
                (os.POSIX_SPAWN_DUP2, child_output, 2),
            ],
            setsigdef=[signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP],
        )
    except OSError:
        os.close(output_end)
        raise
    finally:
        os.close(child_output)
        os.close(child_input)
    try:
        text = _collect(output_end, pid, time.monotonic() + timeout_s)
    finally:
        os.close(output_end)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), text


def _input_end(stdin: bytes | None) -> int:
    if stdin is None:
        return os.open(os.devnull, os.O_RDONLY)
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, stdin)
    finally:
        os.close(write_end)
    return read_end


def _collect(output_end: int, pid: int, deadline: float) -> str:
    """Reads until every holder of the pipe is gone; kills the child at the deadline."""
    poll = select.poll()
    poll.register(output_end, select.POLLIN)
    output = bytearray()
    while True:
        left_ms = max(0, int((deadline - time.monotonic()) * 1000))
        if not poll.poll(left_ms):
            os.kill(pid, signal.SIGKILL)
            break
        chunk = os.read(output_end, 64 << 10)
        if not chunk:
            break
        output += chunk[: max(0, _OUTPUT_LIMIT_BYTES - len(output))]
    return output.decode(errors="replace").strip()
