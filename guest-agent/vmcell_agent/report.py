"""What a forked child tells the agent before its program runs, over a SOCK_SEQPACKET pair.

One packet each: "T" with the place where a file was copied to, "N" with the mount namespace and "P"
with the terminal's master as SCM_RIGHTS, "R" (it is ready: envd listens), "E" with an error's code
and its sentence. The child's end is close-on-exec: end of file without "E" means that execve
worked.
"""

from __future__ import annotations

import os
import socket
import struct

from vmcell_agent.record import Record
from vmcell_protos.errors import CODES, HostError, VmcellError

_PACKET_BYTES = 8192  # the longest path, and what stands before it
EXIT_NOT_STARTED = 127
_FD = struct.Struct("=i")


class Report(Record):
    """One packet as the agent sees it; `kind` is "" at end of file."""

    kind: str
    descriptor: int = -1  # of "P" and "N"; the receiver owns it
    error: VmcellError | None = None  # of "E"
    number: int = 0  # of "T": which of the files
    path: str = ""  # of "T"


def make_pair() -> tuple[socket.socket, socket.socket]:
    """The agent's end (non-blocking) and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def _send_descriptor(channel: socket.socket, kind: bytes, descriptor: int) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(descriptor))
    channel.sendmsg([kind], [rights])


def send_master(channel: socket.socket, master: int) -> None:
    _send_descriptor(channel, b"P", master)


def send_namespace(channel: socket.socket, namespace: int) -> None:
    """All copied files have been told before."""
    _send_descriptor(channel, b"N", namespace)


def send_target(channel: socket.socket, number: int, path: str) -> None:
    channel.send(b"T%d\0%s" % (number, os.fsencode(path)))


def send_ready(channel: socket.socket) -> None:
    channel.send(b"R")


def send_error(channel: socket.socket, error: BaseException) -> None:
    """An error of ours keeps its code; any other is told as what it is."""
    if isinstance(error, VmcellError):
        code, text = error.code, str(error)
    else:
        code, text = "internal", f"{type(error).__name__}: {error}"
    channel.send(b"E" + code.encode() + b"\0" + text.encode("utf-8", "replace")[:3072])


class last_words:  # lower case, because it reads as one: `with last_words(channel):`
    """Whatever exception arrives here is reported, and the child ends."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        status = EXIT_NOT_STARTED
        try:
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                status = error.code
            elif error is not None:
                send_error(self._channel, error)
        finally:
            os._exit(status)


def receive(channel: socket.socket) -> Report:
    """The next packet; raises BlockingIOError when there is none yet."""
    size = socket.CMSG_SPACE(_FD.size)
    try:
        data, ancillary, _, _ = channel.recvmsg(_PACKET_BYTES, size, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return Report("")
    descriptors = [
        _FD.unpack(payload)[0]
        for level, kind, payload in ancillary
        if (level, kind, len(payload)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.size)
    ]
    kind = data[:1].decode("ascii", "replace")
    if kind in ("P", "N") and descriptors:
        return Report(kind, descriptor=descriptors[0])
    for fd in descriptors:
        os.close(fd)
    first, _, second = data[1:].partition(b"\0")
    if kind == "T":
        return Report("T", number=int(first), path=os.fsdecode(second))
    if kind == "E":
        name = first.decode("ascii", "replace")
        sentence = second.decode("utf-8", "replace")
        known = name if name in CODES else "internal"
        return Report("E", error=HostError(sentence, code=known))
    return Report(kind)
