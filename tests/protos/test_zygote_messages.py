"""The zygote's messages: what is sent arrives, and nothing else is taken for a message."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos import zygote
from vmcell_protos.zygote import (
    ALIVE,
    DONE,
    FORK_VMM,
    FORKED,
    HELLO,
    MAX_DATAGRAM_BYTES,
    MAX_FIELDS,
    REFUSED,
    RUN,
    TAKEN,
    Answer,
    MalformedMessage,
    Request,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

WORDS = st.binary(max_size=40).map(lambda word: word.replace(b"\0", b"0"))
VARIABLES = st.tuples(WORDS, WORDS).map(
    lambda pair: b"N" + pair[0].replace(b"=", b"_") + b"=" + pair[1]
)


def fields(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


@given(
    argv=st.lists(WORDS, min_size=1, max_size=20),
    environment=st.lists(VARIABLES, max_size=20),
    stdin=st.binary(max_size=200),
    installation=st.binary(max_size=200),
)
def test_a_run_arrives_as_it_was_sent(
    argv: list[bytes], environment: list[bytes], stdin: bytes, installation: bytes
) -> None:
    sent = Request(RUN, installation, argv=argv, environment=environment, stdin=stdin)
    got = decode_request(encode_request(sent))
    assert (got.kind, got.installation, got.stdin) == (RUN, installation, stdin)
    assert (got.argv, got.environment) == (argv, environment)


@pytest.mark.parametrize("kind", [FORK_VMM, HELLO])
def test_other_requests_are_their_kind_and_installation(kind: bytes) -> None:
    got = decode_request(encode_request(Request(kind, b"here")))
    assert (got.kind, got.installation, got.argv, got.environment) == (kind, b"here", [], [])


def test_a_vmm_may_be_asked_for_by_its_machines_size() -> None:
    got = decode_request(encode_request(Request(FORK_VMM, b"here", argv=[b"1", b"512"])))
    assert (got.kind, got.argv, got.environment) == (FORK_VMM, [b"1", b"512"], [])


@given(
    kind=st.sampled_from([TAKEN, DONE, FORKED, REFUSED, ALIVE]),
    number=st.integers(0, 2**31 - 1),
    output=st.binary(max_size=300),
    errors=st.binary(max_size=300),
)
def test_an_answer_arrives_as_it_was_sent(
    kind: bytes, number: int, output: bytes, errors: bytes
) -> None:
    sent = Answer(kind, number=number, output=output, errors=errors)
    got = decode_answer(encode_answer(sent))
    assert (got.kind, got.number, got.output, got.errors) == (kind, number, output, errors)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_an_error(datagram: bytes) -> None:
    for decode in (decode_request, decode_answer):
        try:
            decode(datagram)
        except MalformedMessage:
            continue


@given(st.data())
def test_a_damaged_request_is_a_request_or_an_error(data: st.DataObject) -> None:
    whole = encode_request(Request(RUN, b"i", argv=[b"a", b"b"], environment=[b"X=1"]))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        if at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
    try:
        got = decode_request(bytes(damaged))
    except MalformedMessage:
        return
    assert got.kind in (RUN, FORK_VMM, HELLO)


MAGIC = b"vmcell-zygote/1"


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\0\0\0",
        fields(MAGIC, RUN, b"i", b""),
        fields(b"vmcell-zygote/2", RUN, b"i", b"", b"1", b"a"),
        fields(MAGIC, b"walk", b"i", b"", b"1", b"a"),
        fields(MAGIC, RUN, b"i", b"", b"0"),
        fields(MAGIC, RUN, b"i", b"", b"2", b"a"),
        fields(MAGIC, RUN, b"i", b"", b"-1", b"a"),
        fields(MAGIC, RUN, b"i", b"", b"99999999999", b"a"),
        fields(MAGIC, RUN, b"i", b"", b"1", b"a\0b"),
        fields(MAGIC, RUN, b"i", b"", b"1", b"a", b"no equals sign"),
        fields(MAGIC, RUN, b"i", b"", b"1", b"a", b"=no name"),
        fields(MAGIC, FORK_VMM, b"i", b"", b"2", b"a"),
        fields(MAGIC, FORK_VMM, b"i", b"", b"1", b"a", b"X=1"),
        fields(MAGIC, FORK_VMM, b"i", b"stdin", b"1", b"a"),
        fields(MAGIC, HELLO, b"i", b"", b"1", b"a"),
        fields(MAGIC, HELLO, b"i", b"stdin", b"0"),
        fields(MAGIC, RUN, b"i", b"", b"1", b"a") + b"\xff\xff\xff\xff",
        fields(MAGIC, RUN, b"i", b"", b"1", b"a")[:-1],
        fields(MAGIC, RUN, b"i", b"", b"1", *[b"a"] * MAX_FIELDS),
        fields(MAGIC, RUN, b"i", bytes(MAX_DATAGRAM_BYTES), b"1", b"a"),
    ],
)
def test_what_is_no_request(datagram: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_request(datagram)


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        fields(MAGIC, DONE, b"0", b""),
        fields(MAGIC, DONE, b"x", b"", b""),
        fields(MAGIC, b"maybe", b"0", b"", b""),
        fields(MAGIC, DONE, b"0", b"", b"", b""),
    ],
)
def test_what_is_no_answer(datagram: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_answer(datagram)


@pytest.mark.parametrize("words", [[b"a" * MAX_DATAGRAM_BYTES], [b"a"] * (MAX_FIELDS + 1)])
def test_what_is_too_long_is_not_sent(words: list[bytes]) -> None:
    with pytest.raises(MalformedMessage, match="too long"):
        encode_request(Request(RUN, b"i", argv=words))


def test_an_installation_is_where_modules_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    before = zygote.installation()
    assert sys.version.encode() in before
    monkeypatch.syspath_prepend("/somewhere/else")
    assert zygote.installation() != before
