"""A saved machine's JSON: what was written is read, and nothing else is, whoever wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_runtime.config import MAX_VCPUS
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.cpuid import CpuidEntry, encode_cpuid, guest_cpuid
from vmcell_runtime.kvm.vcpu_state import LENGTHS, VcpuState
from vmcell_runtime.snapshot.state import MAX_STATE_BYTES, MachineState, decode, encode
from vmcell_runtime.virtio.saved import QueueState, TransportState

WORD, LONG = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HALF = st.integers(0, 2**16 - 1)


def blob(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=16).map(lambda head: head.ljust(length, b"\0"))


VCPUS = st.builds(
    VcpuState,
    mp_state=st.integers(0, 15),
    xsave=st.sampled_from((4096, 8192)).flatmap(blob),
    msrs=st.dictionaries(WORD, LONG, max_size=4),
    **{name: blob(length) for name, length in LENGTHS.items()},
)
QUEUES = st.builds(QueueState, WORD, st.booleans(), LONG, LONG, LONG, HALF, HALF)
NUMBERS = st.dictionaries(st.text(max_size=8), st.integers(-1, 2**64 - 1), max_size=3)
TRANSPORTS = st.builds(
    TransportState,
    device_id=WORD,
    config=st.binary(max_size=16),
    status=st.integers(0, 255),
    device_features_select=WORD,
    driver_features_select=WORD,
    driver_features=LONG,
    queue_select=WORD,
    config_generation=WORD,
    interrupt_status=WORD,
    queues=st.lists(QUEUES, max_size=3).map(tuple),
    own=NUMBERS,
)
ENTRIES = st.builds(CpuidEntry, *[st.sampled_from((0, 1, 4, 0x0B, 2**31 + 8)) | WORD] * 7)
STATES = st.builds(
    MachineState,
    ram_bytes=LONG,
    cpuid=st.lists(ENTRIES, max_size=6).map(tuple),
    tsc_deadline=st.booleans(),
    tsc_khz=WORD,
    tsc=LONG,
    kvmclock_ns=st.integers(0, 2**63 - 1),
    irqchips=st.tuples(*[blob(abi.IRQCHIP_BYTES - 8)] * abi.KVM_NR_IRQCHIPS),
    vcpus=st.lists(VCPUS, min_size=1, max_size=3).map(tuple),
    serial=NUMBERS,
    cmos_index=st.integers(0, 127),
    transports=st.lists(TRANSPORTS, max_size=3).map(tuple),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from((-1, 2**16, 2**31, 2**32, 2**63, 2**64, 10**4000))
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("0", "zz", "00" * 70_000, "\ud800", "0 0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value of a JSON tree."""
    if not isinstance(tree, dict | list):
        return []
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found += [(*path, key), *places(value, (*path, key))]
    return found


@settings(deadline=None)
@given(STATES)
def test_what_was_written_is_read(state: MachineState) -> None:
    assert decode(encode(state)) == state


@settings(deadline=None)
@given(STATES)
def test_any_cpuid_can_be_asked_of_kvm(state: MachineState) -> None:
    """What KVM thinks of it is KVM's; here nothing fails and every number fits its field."""
    for vcpu in (0, MAX_VCPUS - 1):
        encode_cpuid(guest_cpuid(state.cpuid, vcpu, MAX_VCPUS, tsc_deadline=state.tsc_deadline))


@settings(deadline=None, max_examples=400)
@given(STATES, st.data())
def test_a_changed_document_is_refused_or_a_state(state: MachineState, data: st.DataObject) -> None:
    tree = json.loads(encode(state))
    *path, last = data.draw(st.sampled_from(places(tree)))
    inner = tree
    for key in path:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(VALUES)
    else:
        del inner[last]
    try:
        document = json.dumps(tree).encode()
    except ValueError:
        return  # a number that Python does not write
    read_or_refused(document)


@settings(deadline=None)
@given(st.binary(max_size=60) | VALUES.map(repr).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_refused(document: bytes) -> None:
    with pytest.raises(CallerError):
        decode(document)


@pytest.mark.parametrize(
    "document",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"format": 1' + b"0" * 5000 + b"}",
        b'{"format": NaN}',
        b'{"format": 1e400}',
        b"\xff\xfe{\x00}\x00",
        b" " * (MAX_STATE_BYTES + 1),
    ],
    ids=["lists", "objects", "digits", "nan", "infinite", "utf-16", "long"],
)
def test_what_bursts_a_parser_is_refused(document: bytes) -> None:
    with pytest.raises(CallerError):
        decode(document)


def read_or_refused(document: bytes) -> None:
    try:
        found = decode(document)
    except CallerError:
        return
    assert decode(encode(found)) == found
