"""ttrpc framing: two connections joined back to back, whole and byte by byte, and broken peers."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.ttrpc import (
    DATA,
    MAX_DATA_BYTES,
    REQUEST,
    ClientConnection,
    FrameReader,
    ProtocolError,
    ServerConnection,
    encode_frame,
)


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.binary(max_size=200), max_size=6), st.lists(st.integers(0, 10**6), max_size=30))
def test_calls_arrive_whole_however_the_bytes_are_cut(
    payloads: list[bytes], cuts: list[int]
) -> None:
    client, server = ClientConnection(), ServerConnection()
    sent = [client.call("s.S", "M", payload, timeout_ns=5) for payload in payloads]
    calls = []
    for piece in _pieces(b"".join(data for _, data in sent), cuts):
        new, answers = server.receive(piece)
        calls += new
        assert answers == b""
    assert [(c.stream_id, c.payload) for c in calls] == [
        (stream_id, payload) for (stream_id, _), payload in zip(sent, payloads, strict=True)
    ]
    assert all((c.service, c.method, c.timeout_ns) == ("s.S", "M", 5) for c in calls)
    answers = b"".join(server.respond(c.stream_id, c.payload[::-1]) for c in reversed(calls))
    replies = [reply for piece in _pieces(answers, cuts) for reply in client.receive(piece)]
    assert [r.payload for r in replies] == [p[::-1] for p in reversed(payloads)]
    assert all(r.error is None for r in replies)


def test_error_answer_carries_code_and_sentence() -> None:
    client, server = ClientConnection(), ServerConnection()
    _, data = client.call("s.S", "M", b"")
    (call,), _ = server.receive(data)
    (reply,) = client.receive(server.fail(call.stream_id, "not_found", "no task c9"))
    assert reply.error is not None
    assert (reply.error.code, str(reply.error)) == ("not_found", "no task c9")


def test_oversize_request_is_drained_and_answered() -> None:
    client, server = ClientConnection(), ServerConnection()
    huge = struct.pack(">IIBB", MAX_DATA_BYTES + 1, 1, REQUEST, 0) + bytes(MAX_DATA_BYTES + 1)
    answers = b""
    for start in range(0, len(huge), 65536):
        calls, answer = server.receive(huge[start : start + 65536])
        assert calls == []
        answers += answer
    client.call("s.S", "M", b"")  # takes stream id 1
    (reply,) = client.receive(answers)
    assert reply.error is not None
    assert reply.error.code == "resource_exhausted"
    _, data = client.call("s.S", "M", b"after")
    (call,), _ = server.receive(data)
    assert call.payload == b"after"


def test_oversize_answer_becomes_an_error() -> None:
    client, server = ClientConnection(), ServerConnection()
    client.call("s.S", "M", b"")
    (reply,) = client.receive(server.respond(1, bytes(MAX_DATA_BYTES + 1)))
    assert reply.error is not None
    assert reply.error.code == "resource_exhausted"


@pytest.mark.parametrize("stream_ids", [[2], [3, 3], [5, 1]])
def test_bad_stream_ids_end_the_connection(stream_ids: list[int]) -> None:
    server = ServerConnection()
    with pytest.raises(ProtocolError, match="odd and rise"):
        server.receive(b"".join(encode_frame(i, REQUEST, b"") for i in stream_ids))


def test_unknown_frames_are_skipped_and_bad_requests_answered() -> None:
    client, server = ClientConnection(), ServerConnection()
    calls, answers = server.receive(
        encode_frame(1, DATA, b"x") + encode_frame(1, REQUEST, b"\xff\xff")
    )
    assert calls == []
    (reply,) = client.receive(answers)
    assert reply.error is not None
    assert reply.error.code == "invalid_argument"


@given(st.binary(max_size=80))
def test_reader_never_fails_and_holds_little(data: bytes) -> None:
    reader = FrameReader()
    for byte in data:
        for frame in reader.feed(bytes([byte])):
            assert frame.data is None or len(frame.data) <= MAX_DATA_BYTES
