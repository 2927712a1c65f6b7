"""A VMM process forked by the node's zygote: 2 ms and a few pages, not an interpreter's start.

Whatever goes wrong, None is the answer and the caller starts a program. A child that was given up
on ends by itself: the other end of its control socket is closed then.
"""

from __future__ import annotations

import os
import socket

from vmcell_protos.zygote import (
    FORK_VMM,
    FORKED,
    MAX_DATAGRAM_BYTES,
    SOCKET_PATH,
    SOCKET_VARIABLE,
    MalformedMessage,
    Request,
    decode_answer,
    encode_request,
    installation,
)
from vmcell_runtime.size import Size, size_words

FORKED_WITHIN_S = 1.0


class VmmFork:
    """A VMM process that the zygote has been asked for."""

    def __init__(self, zygote: socket.socket) -> None:
        self._zygote = zygote

    def forked(self) -> tuple[int, int] | None:
        """(pid, pidfd), the pidfd the caller's; None if the zygote does not do it. Once."""
        try:
            self._zygote.settimeout(FORKED_WITHIN_S)
            return _forked(self._zygote)
        except (OSError, MalformedMessage):
            return None

    def close(self) -> None:
        self._zygote.close()


def ask_for_vmm(shim_end: int, log_fd: int, size: Size | None) -> VmmFork | None:
    """Asks for a process that runs vmcell_runtime.vmm.main on `shim_end` and logs to `log_fd`; None
    where nobody is to be asked. Both descriptors stay the caller's and may be closed. The process
    is not the caller's child: its exit status cannot be read. With `size` it may be a spare that
    has made itself ready for such a machine."""
    path = os.environ.get(SOCKET_VARIABLE, SOCKET_PATH)
    if not path:
        return None
    zygote = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        zygote.setblocking(False)  # a queue that is full is no reason to wait
        zygote.connect(path)
        argv = size_words(size) if size is not None else []
        request = encode_request(Request(FORK_VMM, installation(), argv=argv))
        socket.send_fds(zygote, [request], [shim_end, log_fd])
    except (OSError, MalformedMessage):
        zygote.close()
        return None
    return VmmFork(zygote)


def _forked(zygote: socket.socket) -> tuple[int, int] | None:
    datagram, fds, _, _ = socket.recv_fds(zygote, MAX_DATAGRAM_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        answer = decode_answer(datagram)
        if answer.kind == FORKED and fds:
            return answer.number, fds.pop()
        return None
    finally:
        for fd in fds:
            os.close(fd)
