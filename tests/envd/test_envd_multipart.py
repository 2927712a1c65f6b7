"""multipart/form-data: any file, any split of the bytes, and what is not well-formed."""

from __future__ import annotations

from email.message import EmailMessage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_agent.envd.wire.multipart import (
    MAX_PART_HEADER_BYTES,
    MultipartError,
    MultipartParser,
    PartBegin,
    PartData,
    PartEnd,
    boundary_of,
)

BOUNDARY = b"XyZ-1"

Part = tuple[str, str | None, bytes]


def encode(parts: list[Part], *, preamble: bytes = b"", padding: bytes = b"") -> bytes:
    body = preamble
    for name, filename, data in parts:
        disposition = f'form-data; name="{name}"'
        if filename is not None:
            escaped = filename.replace("\\", "\\\\").replace('"', '\\"')
            disposition += f'; filename="{escaped}"'
        body += b"--" + BOUNDARY + padding + b"\r\n"
        body += f"Content-Disposition: {disposition}\r\nContent-Type: x/y\r\n\r\n".encode()
        body += data + b"\r\n"
    return body + b"--" + BOUNDARY + b"--\r\nepilogue"


def decode(wire: bytes, step: int) -> list[Part]:
    parser = MultipartParser(BOUNDARY)
    found: list[Part] = []
    current: tuple[str, str | None] = ("", None)
    data = b""
    for start in range(0, len(wire), step):
        for event in parser.feed(wire[start : start + step]):
            if isinstance(event, PartBegin):
                current, data = (event.name, event.filename), b""
            elif isinstance(event, PartData):
                assert event.data
                data += event.data
            elif isinstance(event, PartEnd):
                found.append((*current, data))
    parser.finish()
    return found


# Bytes that look like delimiters, cut at every place.
tricky = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"XyZ", b"XyZ-", b"\r\n--XyZ", b"a"])
).map(b"".join)
names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)


@given(
    st.lists(st.tuples(st.just("file"), st.none() | names, st.binary(max_size=30) | tricky)),
    st.integers(1, 40),
)
@settings(max_examples=300)
def test_any_split_gives_the_parts(parts: list[Part], step: int) -> None:
    clean = [p for p in parts if b"\r\n--" + BOUNDARY not in b"\r\n" + p[2]]
    assert decode(encode(clean), step) == clean


@given(st.binary(max_size=300) | tricky, st.integers(1, 7))
def test_any_bytes_are_parts_or_an_error(wire: bytes, step: int) -> None:
    try:
        decode(b"--" + BOUNDARY + wire, step)
    except MultipartError:
        return


def test_preamble_padding_and_directories() -> None:
    part: Part = ("file", "dir/sub dir/\u00e9.txt", b"x")
    assert decode(encode([part], preamble=b"hello\r\n", padding=b" \t"), 3) == [part]


def test_python_own_writer_is_understood() -> None:
    message = EmailMessage()
    message["Content-Disposition"] = 'form-data; name="file"; filename="a b.bin"'
    assert "a b.bin" in str(message)
    wire = b"--XyZ-1\r\n" + bytes(message).strip() + b"\r\n\r\nbody\r\n--XyZ-1--"
    assert decode(wire, 1) == [("file", "a b.bin", b"body")]


def test_extended_file_name_wins() -> None:
    wire = (
        b"--XyZ-1\r\ncontent-disposition: form-data; name=file; filename=x; "
        b"filename*=UTF-8''%e2%82%ac%2Fa\r\n\r\n\r\n--XyZ-1--"
    )
    assert decode(wire, 5) == [("file", "\u20ac/a", b"")]


def test_an_empty_part_may_share_its_line_end() -> None:
    wire = b"--XyZ-1\r\nContent-Disposition: form-data; name=file\r\n\r\n--XyZ-1--"
    assert decode(wire, 2) == [("file", None, b"")]


def test_memory_stays_small_whatever_the_file() -> None:
    parser = MultipartParser(BOUNDARY)
    parser.feed(b'--XyZ-1\r\nContent-Disposition: form-data; name="file"\r\n\r\n')
    for _ in range(50):
        events = parser.feed(b"\r" * 100_000)
        assert sum(len(e.data) for e in events if isinstance(e, PartData)) >= 99_900
        assert len(parser._buffer) < 100


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"--XyZ-1",
        b"--XyZ-1\r\n",
        b"--XyZ-1\r\nContent-Disposition: form-data; name=file\r\n\r\nabc",
        b"--XyZ-1 text\r\n",
        b"--XyZ-1\r\nX: y\r\n\r\n\r\n--XyZ-1--",
        b"--XyZ-1\r\nContent-Disposition: \xff\r\n\r\n\r\n--XyZ-1--",
        b"--XyZ-1\r\nContent-Disposition: form-data; filename*=latin1''x\r\n\r\n\r\n--XyZ-1--",
        b"--XyZ-1\r\n" + b"a" * (MAX_PART_HEADER_BYTES + 10),
    ],
)
def test_malformed(wire: bytes) -> None:
    with pytest.raises(MultipartError):
        decode(wire, 11)


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('multipart/form-data; charset=utf-8; boundary="a b"', b"a b"),
        ("multipart/form-data;Boundary=abc", b"abc"),
    ],
)
def test_boundaries(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize("suffix", ["", "; boundary=", "; boundary=" + "x" * 71, "; x=y"])
def test_no_boundary(suffix: str) -> None:
    with pytest.raises(MultipartError):
        boundary_of("multipart/form-data" + suffix)
