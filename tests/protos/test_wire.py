"""The codec against google.protobuf: the same bytes out, the same values in, for every message."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_protos.agent import (
    ContainerStatsResponse,
    CreateContainerRequest,
    FileCopy,
    ListProcessesResponse,
    Rootfs,
)
from vmcell_protos.ttrpc_messages import Response, Status
from vmcell_protos.wire import (
    MAX_DEPTH,
    MAX_ITEMS,
    Field,
    Message,
    WireError,
    decode_varint,
    encode_varint,
)
from vmcell_tools.message_codegen import STEMS, compile_protos, flat_name, proto_folder


def _google_classes() -> dict[str, tuple[type[Message], Any]]:
    pool = DescriptorPool()
    found = {}
    for file in compile_protos(proto_folder(), STEMS).file:
        pool.Add(file)  # type: ignore[attr-defined]
        module = importlib.import_module(f"vmcell_protos.{file.name.removesuffix('.proto')}")
        pending = [f"{file.package}.{m.name}" for m in file.message_type]
        while pending:
            name = pending.pop()
            descriptor = pool.FindMessageTypeByName(name)
            if descriptor.GetOptions().map_entry:
                continue
            pending += [nested.full_name for nested in descriptor.nested_types]
            ours = getattr(module, flat_name(f".{name}", file.package))
            found[name] = (ours, GetMessageClass(descriptor))
    return found


CLASSES = _google_classes()

_INTS = {
    "uint32": st.integers(0, 2**32 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "sint32": st.integers(-(2**31), 2**31 - 1),
    "bool": st.booleans(),
    "string": st.text(max_size=12),
    "bytes": st.binary(max_size=12),
}


def _values(field: Field) -> st.SearchStrategy[Any]:
    one = messages(field.message) if field.kind == "message" else _INTS[field.kind]
    if field.label == "map":
        return st.dictionaries(_INTS[field.key], one, max_size=3)
    if field.label == "repeated":
        return st.lists(one, max_size=3)
    if field.kind == "message" or field.label == "optional":
        return st.none() | one
    return one


def messages(cls: type[Message] | None) -> st.SearchStrategy[Message]:
    assert cls is not None
    return st.builds(cls, **{field.name: _values(field) for field in cls.FIELDS})


def _fill(google: Any, ours: Message) -> Any:
    for field in ours.FIELDS:
        value = getattr(ours, field.name)
        target = getattr(google, field.name)
        if field.label == "map":
            for key, item in value.items():
                target[key] = item
        elif field.kind == "message" and field.label == "repeated":
            for item in value:
                _fill(target.add(), item)
        elif field.kind == "message":
            if value is not None:
                target.SetInParent()
                _fill(target, value)
        elif field.label == "repeated":
            target.extend(value)
        elif value is not None:
            setattr(google, field.name, value)
    return google


def _has_one_order(message: Message) -> bool:
    """Whether no map in it, however deep, has two entries."""
    for field in message.FIELDS:
        value = getattr(message, field.name)
        if field.label == "map" and len(value) > 1:
            return False
        inner = {"map": dict.values, "repeated": iter}.get(field.label, lambda one: [one])
        if not all(_has_one_order(m) for m in inner(value) if isinstance(m, Message)):
            return False
    return True


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_bytes_equal_google_protobuf(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CLASSES)))
    cls, google_class = CLASSES[name]
    message = data.draw(messages(cls))
    encoded = message.encode()
    google = _fill(google_class(), message)
    if _has_one_order(message):
        # the order of map entries is each writer's own
        assert encoded == google.SerializeToString()
    assert google_class.FromString(encoded) == google
    assert cls.decode(google.SerializeToString()) == message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CLASSES)), st.binary(max_size=60))
def test_arbitrary_bytes_decode_or_raise_wire_error(name: str, data: bytes) -> None:
    cls, _ = CLASSES[name]
    try:
        message = cls.decode(data)
    except WireError:
        return
    assert isinstance(message, cls)


def test_golden_bytes_of_one_message() -> None:
    """Written out by hand, so that both codecs being wrong alike would show."""
    message = CreateContainerRequest(
        container_id="c1",
        spec_json=b"{}",
        rootfs=Rootfs(lower_devices=["pmem1"]),
        files=[FileCopy(destination="/a", mode=0o644)],
    )
    assert message.encode() == bytes.fromhex(
        "0a026331 12027b7d 1a07 0a05706d656d31 2a07 0a022f61 10a403"
    )


def test_unknown_fields_are_skipped() -> None:
    extra = bytes.fromhex("f80101 fa01026869 fd0100000000 f9010000000000000000")
    rootfs = Rootfs(lower_devices=["x"])
    assert Rootfs.decode(extra + rootfs.encode()) == rootfs


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x0a\x05ab", "cut off"),
        (b"\x0a", "inside a varint"),
        (b"\x0a\x02\xff\xfe", "not UTF-8"),
        (b"\x08\x01", "number where string"),
        (b"\x0b", "wire type 3"),
        (b"\x00", "field number 0"),
        (b"\xff" * 11, "longer than ten"),
    ],
)
def test_broken_bytes_say_where(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        Rootfs.decode(data)


def test_out_of_range_number_is_refused() -> None:
    with pytest.raises(WireError, match=r"mode is -1; uint32 holds 0 to"):
        FileCopy(mode=-1).encode()


def test_packed_and_unpacked_repeats_both_decode() -> None:
    assert ListProcessesResponse.decode(b"\x0a\x02\x08\x07").processes[0].guest_pid == 7


def test_depth_is_bounded() -> None:
    class Nest(Message):
        __slots__ = ("inner",)

        def __init__(self, *, inner: Message | None = None) -> None:
            self.inner = inner

    Nest.FIELDS = (Field(1, "inner", "message", "one", Nest),)
    data = b""
    for _ in range(MAX_DEPTH + 2):
        data = b"\x0a" + encode_varint(len(data)) + data
    with pytest.raises(WireError, match="nested deeper"):
        Nest.decode(data)


@given(st.integers(0, 2**64 - 1))
def test_varint_round_trip(value: int) -> None:
    data = encode_varint(value)
    assert decode_varint(data, 0) == (value, len(data))


class Numbers(Message):
    """No message of ours repeats a number."""

    FIELDS = (Field(1, "values", "uint32", "repeated"),)
    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: list[int] = []


@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        (Status, b"\x1a\x00"),  # details: messages
        (Response, b"\x0a\x00"),  # one message, said again and again
        (ContainerStatsResponse, b"\x0a\x00"),  # cpu: entries of a map
        (Numbers, b"\x08\x01"),
        (Numbers, b"\x0a\x02\x01\x01"),  # packed
    ],
)
def test_no_more_items_than_are_allowed(kind: type[Message], piece: bytes) -> None:
    """Two bytes on the wire were a hundred in memory and seven microseconds each: a frame of the
    guest's of 4 MiB took 135 MiB and 14 s."""
    kind.decode(piece * 40, max_items=100)
    with pytest.raises(WireError, match="more than 100 items"):
        kind.decode(piece * 101, max_items=100)
    with pytest.raises(WireError, match=f"more than {MAX_ITEMS} items"):
        kind.decode(piece * (MAX_ITEMS + 1))
