"""Run a program to its end and collect what it said, without importing subprocess.

Why not subprocess: 10 ms of import in every shim. posix_spawn also never runs our code between
fork and exec, so threads do not matter. The child leads a process group of its own and gets default
SIGPIPE, and stdout and stderr in one pipe; Python's descriptors are close-on-exec.
"""

from __future__ import annotations

import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_OUTPUT_LIMIT_BYTES = 64 << 10


def run_program(
    arguments: list[str],
    *,
    timeout_s: float,
    stdin: bytes | None = None,
    path: str = "",
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """(exit status, what it printed, at most 64 KiB) of the program named by `arguments[0]`.

    A status of 128 + n is death by signal n; a program that overruns `timeout_s` is killed with its
    process group. What it leaves running in the background is not waited for. Raises OSError:
    FileNotFoundError when PATH has no such program. With `path` that file is run instead. None
    stands for an empty `stdin` and for our own environment.
    """
    output_end, child_output = os.pipe()
    os.set_blocking(output_end, False)
    child_input = _input(stdin)
    try:
        spawn = os.posix_spawn if path else os.posix_spawnp
        pid = spawn(
            path or arguments[0],
            arguments,
            os.environ if env is None else env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, child_input, 0),
                (os.POSIX_SPAWN_DUP2, child_output, 1),
                (os.POSIX_SPAWN_DUP2, child_output, 2),
            ],
            setpgroup=0,
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


def _input(stdin: bytes | None) -> int:
    """A file, not a pipe: it takes any size at once, whether the child reads it or not."""
    if stdin is None:
        return os.open(os.devnull, os.O_RDONLY)
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    os.write(fd, stdin)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _collect(output_end: int, pid: int, deadline: float) -> str:
    """What the child writes until it ends; kills it and its group at the deadline."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(output_end, select.POLLIN)
        output = bytearray()
        while True:
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            ready = dict(poll.poll(left_ms))
            if output_end in ready and not _read(output_end, output):
                poll.unregister(output_end)
            if pidfd in ready:
                break
            if not left_ms:
                os.killpg(pid, signal.SIGKILL)
                break
    finally:
        os.close(pidfd)
    # What it wrote last came after the look at the pipe.
    _read(output_end, output)
    return output.decode(errors="replace").strip()


def _read(output_end: int, output: bytearray) -> bool:
    """Takes what is in the pipe, as far as it is wanted; False at its end."""
    try:
        chunk = os.read(output_end, 64 << 10)
    except BlockingIOError:
        return True
    output += chunk[: max(0, _OUTPUT_LIMIT_BYTES - len(output))]
    return bool(chunk)
