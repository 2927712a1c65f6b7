"""What is said to the node's zygote and by it: bytes in, records out, no I/O.

One message is one datagram of a SOCK_SEQPACKET socket: fields, each a length (4 bytes, little
endian) and its bytes. Descriptors travel beside a request:
- `run` (from the shim binary): the working directory;
- `fork_vmm` (from a shim): the VMM's end of the control socket, then its log; its argv, which may
  be empty, is the machine's size (vmcell_runtime.size), for a VMM that waits with a frame of it;
- `hello` (from anyone who looks after the zygote): none.
Answers: `taken` comes first from the child of a `run`, then `done`; `taken` and `forked` carry the
child's pidfd;
`refused` to any request means that the asker has to do it by itself.

No import at all but `sys`: every `start` waits for this module.
"""

import sys

SOCKET_PATH = "/run/vmcell/zygote.sock"
# Names another socket; set and empty: there is no zygote.
SOCKET_VARIABLE = "VMCELL_ZYGOTE"
MAX_DATAGRAM_BYTES = 128 << 10
MAX_FIELDS = 4096

_MAGIC = b"vmcell-zygote/1"
RUN, FORK_VMM, HELLO = b"run", b"fork_vmm", b"hello"
TAKEN, DONE, FORKED, REFUSED, ALIVE = b"taken", b"done", b"forked", b"refused", b"alive"
_REQUESTS = (RUN, FORK_VMM, HELLO)
_ANSWERS = (TAKEN, DONE, FORKED, REFUSED, ALIVE)
_NUMBER_LIMIT = 1 << 31


class MalformedMessage(ValueError):
    """Bytes that are no message of this protocol, or a message too long to send."""


class Request:
    """What is asked for. `environment` ("NAME=value") belongs to `run`, and so does `stdin`: what
    the caller has read of its standard input."""

    __slots__ = ("argv", "environment", "installation", "kind", "stdin")

    def __init__(
        self,
        kind: bytes,
        installation: bytes,
        *,
        argv: list[bytes] | None = None,
        environment: list[bytes] | None = None,
        stdin: bytes = b"",
    ) -> None:
        self.kind = kind
        self.installation = installation
        self.argv = argv or []
        self.environment = environment or []
        self.stdin = stdin


class Answer:
    """`number`: the exit status of `done`, the pid of `forked` and `alive`. `output` and `errors`:
    what `done` would have printed; `output` of `alive` is the zygote's installation, `errors` of
    `refused` the reason."""

    __slots__ = ("errors", "kind", "number", "output")

    def __init__(
        self, kind: bytes, *, number: int = 0, output: bytes = b"", errors: bytes = b""
    ) -> None:
        self.kind = kind
        self.number = number
        self.output = output
        self.errors = errors


def installation() -> bytes:
    """Which vmcell this process runs: protocol, interpreter and where its modules come from.

    Two processes with the same answer would import the same files. That the files are still those
    which a zygote has imported is for the zygote to see.
    """
    return "\n".join((_MAGIC.decode(), sys.version, *sys.path)).encode(errors="surrogateescape")


def encode_request(request: Request) -> bytes:
    """One datagram; raises MalformedMessage when it would be too long."""
    argc = b"%d" % len(request.argv)
    return _pack(
        [
            *(_MAGIC, request.kind, request.installation, request.stdin, argc),
            *request.argv,
            *request.environment,
        ]
    )


def decode_request(datagram: bytes) -> Request:
    """What the datagram asks for; raises MalformedMessage."""
    fields = _unpack(datagram)
    if len(fields) < 5 or fields[0] != _MAGIC or fields[1] not in _REQUESTS:
        raise MalformedMessage("this is no request of this version of the zygote's protocol")
    _, kind, where, stdin, argc = fields[:5]
    count = _number(argc)
    words = fields[5:]
    fits = count == len(words) and not stdin if kind != RUN else 0 < count <= len(words)
    if not fits or (kind == HELLO and words):
        raise MalformedMessage(f"a {kind.decode()} request has {len(words)} words, {count} of argv")
    if any(b"\0" in word for word in words):
        raise MalformedMessage("a word of a request has a zero byte in it")
    environment = words[count:]
    if any(b"=" not in pair[1:] for pair in environment):
        raise MalformedMessage("an environment variable of a request has no name or no value")
    return Request(kind, where, argv=words[:count], environment=environment, stdin=stdin)


def encode_answer(answer: Answer) -> bytes:
    """One datagram; raises MalformedMessage when it would be too long."""
    number = b"%d" % answer.number
    return _pack([_MAGIC, answer.kind, number, answer.output, answer.errors])


def decode_answer(datagram: bytes) -> Answer:
    """What the datagram says; raises MalformedMessage, also for the end of the stream (b"")."""
    fields = _unpack(datagram)
    if len(fields) != 5 or fields[0] != _MAGIC or fields[1] not in _ANSWERS:
        raise MalformedMessage("this is no answer of this version of the zygote's protocol")
    return Answer(fields[1], number=_number(fields[2]), output=fields[3], errors=fields[4])


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 10 or int(text) >= _NUMBER_LIMIT:
        raise MalformedMessage(f"{text[:20]!r} is no number from 0 to {_NUMBER_LIMIT - 1}")
    return int(text)


def _pack(fields: list[bytes]) -> bytes:
    datagram = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    if len(datagram) > MAX_DATAGRAM_BYTES or len(fields) > MAX_FIELDS:
        raise MalformedMessage(f"a message of {len(datagram)} bytes is too long for the zygote")
    return datagram


def _unpack(datagram: bytes) -> list[bytes]:
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise MalformedMessage(f"a message of {len(datagram)} bytes is too long")
    fields: list[bytes] = []
    at = 0
    while at < len(datagram):
        start = at + 4
        at = start + int.from_bytes(datagram[at:start], "little")
        if at > len(datagram) or start > len(datagram) or len(fields) == MAX_FIELDS:
            raise MalformedMessage("a message's fields do not fill it, or are too many")
        fields.append(datagram[start:at])
    return fields
