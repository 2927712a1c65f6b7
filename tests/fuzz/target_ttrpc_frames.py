"""ttrpc frames, to the server (containerd, the guest's agent) and to the client (the shim).

Faces containerd and the guest. Bytes make the same frames however they are cut; nothing but
ProtocolError comes out of them, and a connection holds no more than one frame.
"""

from __future__ import annotations

from collections.abc import Iterator

from supply import Supply

from vmcell_protos.errors import CODES
from vmcell_protos.ttrpc import ClientConnection, FrameReader, ProtocolError, ServerConnection

ALLOWED: tuple[type[Exception], ...] = (ProtocolError,)
REACHES = (
    "vmcell_protos.ttrpc:ServerConnection.respond",
    "vmcell_protos.ttrpc:ClientConnection._reply",
)
CALLS = 3


def one(data: bytes) -> None:
    supply = Supply(data)
    mode = supply.byte()
    step = 1 + supply.byte() % 64
    stream = supply.rest()
    whole, cut = FrameReader(), FrameReader()
    frames = [(f.stream_id, f.kind, f.flags, f.data) for f in whole.feed(stream)]
    pieces = [f for piece in _pieces(stream, step) for f in cut.feed(piece)]
    assert frames == [(f.stream_id, f.kind, f.flags, f.data) for f in pieces]
    if mode & 1:
        _serve(stream, step)
    else:
        _answer(stream, step)


def _pieces(stream: bytes, step: int) -> Iterator[bytes]:
    for start in range(0, len(stream), step):
        yield stream[start : start + step]


def _serve(stream: bytes, step: int) -> None:
    server = ServerConnection()
    seen = 0
    for piece in _pieces(stream, step):
        calls, _ = server.receive(piece)
        for call in calls:
            assert call.stream_id % 2 == 1
            assert call.stream_id > seen
            seen = call.stream_id
            assert isinstance(call.service, str)
            server.respond(call.stream_id, call.payload)


def _answer(stream: bytes, step: int) -> None:
    client = ClientConnection()
    sent = {client.call("s.S", "M", b"x")[0] for _ in range(CALLS)}
    for piece in _pieces(stream, step):
        for reply in client.receive(piece):
            assert reply.stream_id in sent, "nobody asked for it, or it was answered before"
            sent.remove(reply.stream_id)
            assert reply.error is None or reply.error.code in CODES


def seeds() -> dict[str, bytes]:
    client, server = ClientConnection(), ServerConnection()
    calls = [client.call("vmcell.agent.v1.Agent", "Hello", b"\x0a\x01x", 10**9) for _ in range(2)]
    requests = b"".join(data for _, data in calls)
    good = server.respond(1, b"\x0a\x04fake") + server.respond(3, b"")
    bad = server.fail(1, "not_found", "container c1 is not there")
    return {
        "requests": b"\x01\x3f" + requests,
        "requests-in-pieces": b"\x01\x02" + requests,
        "answers": b"\x00\x3f" + good,
        "answers-in-pieces": b"\x00\x00" + good,
        "refusal": b"\x00\x09" + bad,
    }
