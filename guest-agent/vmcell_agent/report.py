"""What a forked child tells the agent before its program runs, over a SOCK_SEQPACKET pair.

One packet each: "P" with the terminal's master as SCM_RIGHTS, "R" (envd listens), "E" with an
error's code and its sentence. The child's end is close-on-exec: end of file without "E" means that
execve worked.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

from vmcell_protos.errors import CODES, HostError, VmcellError

_PACKET_BYTES = 4096
_FD = struct.Struct("=i")


class Report(NamedTuple):
    """One packet as the agent sees it; `kind` is "" at end of file."""

    kind: str
    master: int = -1  # of "P"; the receiver owns it
    error: VmcellError | None = None  # of "E"


def make_pair() -> tuple[socket.socket, socket.socket]:
    """The agent's end (non-blocking) and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def send_master(channel: socket.socket, master: int) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(master))
    channel.sendmsg([b"P"], [rights])


def send_ready(channel: socket.socket) -> None:
    channel.send(b"R")


def send_error(channel: socket.socket, error: BaseException) -> None:
    """An error of ours keeps its code; any other is told as what it is."""
    if isinstance(error, VmcellError):
        code, text = error.code, str(error)
    else:
        code, text = "internal", f"{type(error).__name__}: {error}"
    channel.send(b"E" + code.encode() + b"\0" + text.encode("utf-8", "replace")[:3072])


def receive(channel: socket.socket) -> Report:
    """The next packet; raises BlockingIOError when there is none yet."""
    size = socket.CMSG_SPACE(_FD.size)
    try:
        data, ancillary, _, _ = channel.recvmsg(_PACKET_BYTES, size, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return Report("")
    masters = [
        _FD.unpack(payload)[0]
        for level, kind, payload in ancillary
        if (level, kind, len(payload)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.size)
    ]
    kind = data[:1].decode("ascii", "replace")
    if kind == "P" and masters:
        return Report("P", master=masters[0])
    for fd in masters:
        os.close(fd)
    if kind == "E":
        code, _, text = data[1:].partition(b"\0")
        name = code.decode("ascii", "replace")
        sentence = text.decode("utf-8", "replace")
        known = name if name in CODES else "internal"
        return Report("E", error=HostError(sentence, code=known))
    return Report(kind)
