"""Where a body ends: as h11 sees it, whatever the pieces it comes in."""

from __future__ import annotations

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from vmcell_agent.envd.wire.body import BodyError, ChunkedBody, StatedBody

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
chunk = st.builds(
    lambda size, ext, data, end: (size or b"%x" % len(data)) + ext + b"\r\n" + data + end,
    st.none() | st.sampled_from([b"", b"0", b"-1", b"0x5", b"5 5", b"F" * 17, b"00000005"]),
    st.sampled_from([b"", b";a=b", b" ", b";a\x00", b" ;x"]),
    st.binary(max_size=12),
    st.sampled_from([b"\r\n", b"", b"\n", b"xx"]),
)
good = st.binary(min_size=1, max_size=12).map(lambda data: b"%x\r\n%b\r\n" % (len(data), data))
trailers = st.lists(st.sampled_from([b"A: b\r\n", b"bad\r\n", b"\r\n", b": x\r\n"]), max_size=3)
bodies = st.builds(
    lambda chunks, last, lines, rest: b"".join(chunks) + last + b"".join(lines) + rest,
    st.lists(good, max_size=4) | st.lists(good | chunk, max_size=4),
    st.sampled_from([b"0\r\n", b"000\r\n", b"0;x\r\n"]),
    trailers,
    st.sampled_from([b"\r\n", b"\r\nGET / HTTP/1.1\r\n", b""]),
)


def by_h11(data: bytes) -> tuple[bytes, bool | None, bytes]:
    """The body, whether it is complete (None: refused), and what came behind it."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(HEAD)
    connection.next_event()
    connection.receive_data(data)
    body = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return body, True, connection.trailing_data[0]
            else:
                return body, False, b""
    except h11.RemoteProtocolError:
        return body, None, b""


def by_us(data: bytes, step: int) -> tuple[bytes, bool | None, bytes]:
    body, rest = b"", b""
    reader = ChunkedBody()
    for start in range(0, len(data), step):
        if reader.done:
            rest += data[start : start + step]
            continue
        try:
            for piece in reader.take(memoryview(data)[start : start + step]):
                body += piece
        except BodyError:
            assert not list(reader.take(memoryview(b"5\r\nabcde\r\n"))), "it takes nothing more"
            return body, None, b""
        rest += reader.rest
    return body, reader.done, rest


@given(bodies, st.integers(1, 40))
@example(b"5\r\nabcde\r\n0\r\n\r\n", 1)
@example(b"0\r\n\r\nrest", 3)
def test_chunks_end_where_h11_sees_their_end(data: bytes, step: int) -> None:
    ours, theirs = by_us(data, step), by_h11(data)
    if ours[1] is None or theirs[1] is None:
        # Either may refuse more than the other; what h11 refuses is never a complete body here,
        # but for trailers, which it reads as one block.
        assert ours[1] is not True or theirs[1] is not None
        return
    assert ours == theirs


@given(st.integers(1, 200), st.binary(max_size=300), st.integers(1, 50))
def test_a_stated_length_is_exact(length: int, data: bytes, step: int) -> None:
    reader = StatedBody(length)
    body = b""
    at = 0
    while at < len(data) and not reader.done:
        count = reader.wanted(step)
        assert 0 < count <= step
        body += b"".join(reader.take(memoryview(data)[at : at + count]))
        at += count
    assert body == data[:length]
    assert reader.done == (len(data) >= length)
    assert reader.rest == b""
