"""vhost-user messages against bytes written out by hand from the protocol's document."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import HostError
from vmcell_runtime.memory import SharedRegion
from vmcell_runtime.virtio import vhost_user_abi as wire
from vmcell_runtime.virtio.queue import RingLayout


@pytest.mark.parametrize(
    ("message", "golden"),
    [
        (wire.encode(wire.GET_FEATURES), "01000000 01000000 00000000"),
        (wire.encode(wire.SET_OWNER, need_reply=True), "03000000 09000000 00000000"),
        (
            wire.encode(wire.SET_FEATURES, wire.u64(1 << 32 | 1 << 30), need_reply=True),
            "02000000 09000000 08000000 0000004001000000",
        ),
        (
            wire.encode(wire.SET_VRING_NUM, wire.vring_state(1, 1024), need_reply=True),
            "08000000 09000000 08000000 01000000 00040000",
        ),
        (
            wire.encode(wire.GET_VRING_BASE, wire.vring_state(1, 0)),
            "0b000000 01000000 08000000 01000000 00000000",
        ),
        (
            wire.encode(wire.SET_VRING_KICK, wire.u64(1), need_reply=True),
            "0c000000 09000000 08000000 0100000000000000",
        ),
        (
            wire.encode(
                wire.SET_VRING_ADDR, wire.vring_addresses(1, RingLayout(8, 0x1000, 0x2000, 0x3000))
            ),
            "09000000 01000000 28000000 01000000 00000000"
            "0010000000000000 0030000000000000 0020000000000000 0000000000000000",
        ),
        (
            wire.encode(
                wire.SET_MEM_TABLE,
                wire.memory_table(
                    [SharedRegion(0, 0xC0000000, 5, 0x1000), SharedRegion(1 << 32, 4096, 6, 0)]
                ),
            ),
            "05000000 01000000 48000000 02000000 00000000"
            "0000000000000000 000000c000000000 0000000000000000 0010000000000000"
            "0000000001000000 0010000000000000 0000000001000000 0000000000000000",
        ),
    ],
)
def test_golden_bytes(message: bytes, golden: str) -> None:
    assert message == bytes.fromhex(golden)


@given(st.integers(1, 40), st.sampled_from([0, wire.FLAG_NEED_REPLY]))
def test_the_answer_to_the_question_passes(request: int, more: int) -> None:
    # A back-end may leave the wish for an acknowledgement in the flags.
    wire.check_answer_header(request, struct.pack("<III", request, 5 | more, 8))


@given(st.integers(1, 40), st.binary(min_size=12, max_size=12))
def test_any_other_header_does_not(request: int, header: bytes) -> None:
    said, flags, size = struct.unpack("<III", header)
    if said == request and flags & 7 == 5 and size == 8:
        return
    with pytest.raises(HostError, match=f"request {request} "):
        wire.check_answer_header(request, header)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ((2, 5, 8), "with request 2, flags 0x5"),
        ((1, 1, 8), "with request 1, flags 0x1"),
        ((1, 6, 8), "with request 1, flags 0x6"),
        ((1, 5, 0), "with 0 bytes, not 8"),
        ((1, 5, 0xFFFFFFFF), "with 4294967295 bytes, not 8"),
    ],
)
def test_what_is_wrong_is_said(header: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(HostError, match=sentence):
        wire.check_answer_header(1, struct.pack("<III", *header))


@given(st.integers(0, 2**64 - 1))
def test_numbers_come_back(value: int) -> None:
    assert wire.read_u64(wire.u64(value)) == value
    assert wire.read_vring_state(wire.vring_state(value >> 32, value & 0xFFFFFFFF)) == (
        value >> 32,
        value & 0xFFFFFFFF,
    )


@pytest.mark.parametrize("count", [0, 9])
def test_a_table_has_one_to_eight_regions(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} regions"):
        wire.memory_table([SharedRegion(0, 4096, 3, 0)] * count)
