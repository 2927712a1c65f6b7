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

FORKED_WITHIN_S = 1.0


def fork_vmm(shim_end: int, log_fd: int) -> tuple[int, int] | None:
    """(pid, pidfd) of a process that runs vmcell_runtime.vmm.main on `shim_end` and logs to
    `log_fd`; None without a zygote that does it. Both descriptors stay the caller's, the pidfd
    becomes it. The process is not the caller's child: its exit status cannot be read."""
    path = os.environ.get(SOCKET_VARIABLE, SOCKET_PATH)
    if not path:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as zygote:
        try:
            zygote.setblocking(False)  # a queue that is full is no reason to wait
            zygote.connect(path)
            request = encode_request(Request(FORK_VMM, installation()))
            socket.send_fds(zygote, [request], [shim_end, log_fd])
            zygote.settimeout(FORKED_WITHIN_S)
            return _forked(zygote)
        except (OSError, MalformedMessage):
            return None


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
