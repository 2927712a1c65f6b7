"""ttrpc framing: two connections joined back to back, whole and byte by byte, and broken peers."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_protos.ttrpc import (
    DATA,
    MAX_DATA_BYTES,
    MAX_UNANSWERED,
    REQUEST,
    RESPONSE,
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
    client.call("s.S", "M", b"")
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


@pytest.mark.parametrize(
    ("stream_id", "kind"),
    [
        (1, REQUEST),
        (1, DATA),
        (1, 0),
        (1, 200),
        (3, RESPONSE),
        (2, RESPONSE),
        (2**32 - 1, RESPONSE),
    ],
)
def test_what_answers_no_call_ends_the_connection(stream_id: int, kind: int) -> None:
    """Else a guest could keep the shim reading for ever."""
    client = ClientConnection()
    client.call("s.S", "M", b"")
    with pytest.raises(ProtocolError, match=f"kind {kind} on stream {stream_id};"):
        client.receive(encode_frame(stream_id, kind, b""))


def test_a_call_is_answered_once() -> None:
    client, server = ClientConnection(), ServerConnection()
    client.call("s.S", "M", b"")
    assert len(client.receive(server.respond(1, b""))) == 1
    with pytest.raises(ProtocolError, match="on stream 1;"):
        client.receive(server.respond(1, b""))


def test_calls_without_an_answer_are_not_endless() -> None:
    client, server = ClientConnection(), ServerConnection()
    for _ in range(MAX_UNANSWERED):
        client.call("s.S", "M", b"")
    with pytest.raises(CallerError, match=f"{MAX_UNANSWERED} calls before") as caught:
        client.call("s.S", "M", b"")
    assert caught.value.code == "resource_exhausted"
    client.receive(server.respond(5, b""))
    assert client.call("s.S", "M", b"")[0] == 2 * MAX_UNANSWERED + 1


def test_a_client_may_take_less_than_the_protocol() -> None:
    client, server = ClientConnection(max_data_bytes=1000, max_items=3), ServerConnection()
    for _ in range(3):
        client.call("s.S", "M", b"")
    fits, long = client.receive(server.respond(1, bytes(900)) + server.respond(3, bytes(1001)))
    assert (fits.payload, fits.error) == (bytes(900), None)
    assert long.error is not None
    assert str(long.error) == "answer is larger than 1000 bytes"
    details = b"\x0a\x08" + b"\x1a\x00" * 4
    (many,) = client.receive(encode_frame(5, RESPONSE, details))
    assert many.error is not None
    assert "more than 3 items" in str(many.error)
