"""The binary's short way: the node's zygote does it, the answer is printed here.

Every `start` and `delete` waits for this, so only modules built into the interpreter are imported,
and the present one. Whatever goes wrong, None is the answer and the binary does it by itself, once
the child that may have begun it is dead and its descriptors are closed.
"""

import _socket
import posix
import sys

from vmcell_protos.zygote import (
    DONE,
    MAX_DATAGRAM_BYTES,
    RUN,
    SOCKET_PATH,
    SOCKET_VARIABLE,
    TAKEN,
    Answer,
    MalformedMessage,
    Request,
    decode_answer,
    encode_request,
    installation,
)

# How long until the zygote's child says that it is there; it takes 2 ms on a quiet machine.
TAKEN_WITHIN_S = 0.5
# What the child gives itself then, in case its caller was killed, and how long it is waited for;
# containerd gives a `delete` 5 s.
CHILD_LIFE_S = 4.0
DONE_WITHIN_S = 4.5
_DEAD_WITHIN_MS = 1000
_CHUNK_BYTES = 64 << 10
_STDIN_LIMIT_BYTES = 5 << 20


def read_stdin() -> bytes:
    """What containerd wrote: nothing, the runtime's options, or (2.3 on) BootstrapParams.

    More than 5 MiB is cut; `start` refuses it.
    """
    data = b""
    try:
        if posix.isatty(0):
            return b""
        while len(data) < _STDIN_LIMIT_BYTES and (chunk := posix.read(0, _CHUNK_BYTES)):
            data += chunk
    except OSError:
        # No stdin at all: as empty as /dev/null.
        return data
    return data


def ask_zygote(argv: list[str], stdin: bytes) -> Answer | None:
    """The zygote's `done` for this invocation; None when the binary has to do it by itself."""
    path = posix.environ.get(SOCKET_VARIABLE.encode(), SOCKET_PATH.encode())
    if not path:
        return None
    zygote = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        return _converse(zygote, path, argv, stdin)
    except (OSError, MalformedMessage):
        return None
    finally:
        zygote.close()


def _converse(zygote: _socket.socket, path: bytes, argv: list[str], stdin: bytes) -> Answer | None:
    request = Request(
        RUN,
        installation(),
        argv=[_bytes(word) for word in argv],
        environment=[b"%s=%s" % pair for pair in posix.environ.items()],
        stdin=stdin,
    )
    datagram = encode_request(request)
    zygote.setblocking(False)  # a queue that is full is no reason to wait
    zygote.connect(path)
    bundle = posix.open(".", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, bundle.to_bytes(4, sys.byteorder))
    zygote.sendmsg([datagram], [rights])
    zygote.settimeout(TAKEN_WITHIN_S)
    answer, child = _receive(zygote)
    if answer.kind == TAKEN:
        answer = _wait_done(zygote, child)
    return answer if answer.kind == DONE else None


def _receive(zygote: _socket.socket) -> tuple[Answer, int]:
    """An answer and the descriptor that came along, or -1."""
    datagram, rights, _, _ = zygote.recvmsg(MAX_DATAGRAM_BYTES, _socket.CMSG_SPACE(4))
    fds = [int.from_bytes(data[:4], sys.byteorder) for _, _, data in rights]
    return decode_answer(datagram), fds[0] if fds else -1


def _wait_done(zygote: _socket.socket, child: int) -> Answer:
    """The child's second answer; an error only when the child, a pidfd, has ended."""
    zygote.settimeout(DONE_WITHIN_S)
    try:
        return _receive(zygote)[0]
    except (OSError, MalformedMessage):
        _end(child)
        raise


def _end(child: int) -> None:
    """Kills it and waits until all it had is closed: its socket must not answer any more."""
    import _signal  # type: ignore[import-not-found]  # no stub for a private module
    import select

    try:
        _signal.pidfd_send_signal(child, _signal.SIGKILL)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(child, select.POLLIN)
    poll.poll(_DEAD_WITHIN_MS)


def _bytes(word: str) -> bytes:
    return word.encode(sys.getfilesystemencoding(), "surrogateescape")
