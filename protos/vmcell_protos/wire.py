"""The protobuf wire format for messages declared as tables: bytes in, attributes out.

What this is for: the shim, the VMM and the guest's PID 1 speak about thirty small messages, and
importing google.protobuf costs each of them 45 to 60 ms. What it does not do: reflection, JSON,
extensions, groups, proto2. Source of the rules: protobuf.dev, "Encoding"; the tests compare every
message of every `.proto` file here with google.protobuf's bytes.

A message class is generated from a `.proto` file (see `vmcell_tools.message_codegen`): `FIELDS` is
its table, its constructor takes keywords only. Repeated fields are lists, maps are dicts, nested
messages are instances or None, proto3 `optional` scalars are None when absent. Unknown fields are
skipped, as the format asks.
"""

from __future__ import annotations

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, TypeVar

    M = TypeVar("M", bound="Message")

MAX_DEPTH = 32
MAX_ITEMS = 1 << 16
"""How many messages, map entries and repeated values one message may bring: each of them takes two
bytes on the wire, and a hundred and a microsecond or ten here."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_U64 = (1 << 64) - 1


class WireError(CallerError):
    """The bytes are not a message of this form; the sentence says where they stop making sense."""


class Field:
    """One row of a message's table.

    kind: "string", "bytes", "bool", "uint32", "uint64", "int32", "int64", "sint32", "sint64" or
    "message". label: "one", "optional", "repeated" or "map". `message` is the class of a nested
    message; of a map, the class of its values or None. `key` and `value` are a map's kinds.
    """

    __slots__ = ("key", "kind", "label", "message", "name", "number")

    def __init__(
        self,
        number: int,
        name: str,
        kind: str,
        label: str = "one",
        message: type[Message] | None = None,
        key: str = "",
    ) -> None:
        self.number = number
        self.name = name
        self.kind = kind
        self.label = label
        self.message = message
        self.key = key


class Message:
    """Base of the generated classes: equality, repr, `encode` and `decode`."""

    __slots__ = ()
    FIELDS: ClassVar[tuple[Field, ...]] = ()

    def encode(self) -> bytes:
        """The message's bytes, fields in order of number, map entries in order of key."""
        out = bytearray()
        for field in self.FIELDS:
            _encode_field(out, field, getattr(self, field.name))
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, max_items: int = MAX_ITEMS) -> Self:
        """A new message from `data`; raises WireError."""
        return _decode_message(cls, bytes(data), 0, _Allowance(max_items))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in self.FIELDS)

    __hash__ = None  # type: ignore[assignment]  # messages are mutable

    def __repr__(self) -> str:
        inner = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in self.FIELDS)
        return f"{type(self).__name__}({inner})"


class _Allowance:
    """How many items are left to one message and all that is in it."""

    __slots__ = ("left", "most")

    def __init__(self, most: int) -> None:
        self.left = self.most = most

    def take(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise WireError(f"message of more than {self.most} items")


def encode_varint(value: int) -> bytes:
    """An unsigned varint, at most ten bytes."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes, position: int) -> tuple[int, int]:
    """The varint at `position` and the position behind it; raises WireError."""
    value = shift = 0
    while True:
        if position >= len(data):
            raise WireError(f"message ends inside a varint at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, position
        shift += 7
        if shift > 63:
            raise WireError(f"varint longer than ten bytes at byte {position}")


_INT_RANGES = {
    "bool": (0, 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, _U64),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "sint32": (-(1 << 31), (1 << 31) - 1),
    "sint64": (-(1 << 63), (1 << 63) - 1),
}


def _int_to_varint(kind: str, name: str, value: int) -> bytes:
    low, high = _INT_RANGES[kind]
    if not low <= value <= high:
        raise WireError(f"{name} is {value}; {kind} holds {low} to {high}")
    if kind in ("sint32", "sint64"):
        value = value << 1 if value >= 0 else (-value << 1) - 1
    return encode_varint(value & _U64)


def _int_from_varint(kind: str, value: int) -> Any:
    if kind == "bool":
        return value != 0
    if kind in ("sint32", "sint64"):
        return (value >> 1) ^ -(value & 1)
    bits = 32 if kind.endswith("32") else 64
    value &= (1 << bits) - 1
    if kind.startswith("int") and value >> (bits - 1):
        value -= 1 << bits
    return value


def _encode_value(kind: str, name: str, value: Any) -> tuple[int, bytes]:
    if kind == "string":
        return _BYTES, value.encode()
    if kind == "bytes":
        return _BYTES, bytes(value)
    if kind == "message":
        return _BYTES, value.encode()
    return _VARINT, _int_to_varint(kind, name, value)


def _put(out: bytearray, number: int, wire_type: int, payload: bytes) -> None:
    out += encode_varint(number << 3 | wire_type)
    if wire_type == _BYTES:
        out += encode_varint(len(payload))
    out += payload


def _encode_field(out: bytearray, field: Field, value: Any) -> None:
    if field.label == "map":
        for key in sorted(value):
            entry = bytearray()
            _put(entry, 1, *_encode_value(field.key, field.name, key))
            _put(entry, 2, *_encode_value(field.kind, field.name, value[key]))
            _put(out, field.number, _BYTES, bytes(entry))
    elif field.label == "repeated":
        if field.kind in _INT_RANGES:
            if value:
                packed = b"".join(_int_to_varint(field.kind, field.name, v) for v in value)
                _put(out, field.number, _BYTES, packed)
        else:
            for item in value:
                _put(out, field.number, *_encode_value(field.kind, field.name, item))
    elif value is not None and (value or field.label == "optional" or field.kind == "message"):
        _put(out, field.number, *_encode_value(field.kind, field.name, value))


def _take(data: bytes, position: int, wire_type: int) -> tuple[int | bytes, int]:
    """The raw value of one field: an int for a varint, else its bytes."""
    if wire_type == _VARINT:
        return decode_varint(data, position)
    if wire_type == _BYTES:
        length, position = decode_varint(data, position)
    elif wire_type == _FIXED64:
        length = 8
    elif wire_type == _FIXED32:
        length = 4
    else:
        raise WireError(f"wire type {wire_type} at byte {position} is not known")
    if length > len(data) - position:
        raise WireError(f"field of {length} bytes at byte {position} of {len(data)} is cut off")
    return data[position : position + length], position + length


def _decode_value(
    kind: str,
    name: str,
    message: type[Message] | None,
    raw: int | bytes,
    depth: int,
    allowance: _Allowance,
) -> Any:
    if isinstance(raw, int):
        if kind in _INT_RANGES:
            return _int_from_varint(kind, raw)
        raise WireError(f"{name} holds a number where {kind} is expected")
    if kind == "string":
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise WireError(f"{name} is not UTF-8: {error}") from error
    if kind == "bytes":
        return raw
    if kind == "message" and message is not None:
        return _decode_message(message, raw, depth + 1, allowance)
    raise WireError(f"{name} holds {len(raw)} bytes where {kind} is expected")


def _decode_packed(kind: str, raw: bytes, allowance: _Allowance) -> list[Any]:
    values, position = [], 0
    while position < len(raw):
        allowance.take()
        value, position = decode_varint(raw, position)
        values.append(_int_from_varint(kind, value))
    return values


def _decode_entry(
    field: Field, raw: int | bytes, depth: int, allowance: _Allowance
) -> tuple[Any, Any]:
    if isinstance(raw, int):
        raise WireError(f"{field.name} holds a number where a map entry is expected")
    allowance.take()
    key: Any = "" if field.key == "string" else 0
    value: Any = {"string": "", "bytes": b"", "message": None}.get(field.kind, 0)
    if field.kind == "message" and field.message is not None:
        value = field.message()
    position = 0
    while position < len(raw):
        tag, position = decode_varint(raw, position)
        item, position = _take(raw, position, tag & 7)
        if tag >> 3 == 1:
            key = _decode_value(field.key, field.name, None, item, depth, allowance)
        elif tag >> 3 == 2:
            value = _decode_value(field.kind, field.name, field.message, item, depth, allowance)
    return key, value


def _decode_message(cls: type[M], data: bytes, depth: int, allowance: _Allowance) -> M:
    if depth > MAX_DEPTH:
        raise WireError(f"messages nested deeper than {MAX_DEPTH}")
    allowance.take()
    message = cls()
    table = {field.number: field for field in cls.FIELDS}
    position = 0
    while position < len(data):
        tag, position = decode_varint(data, position)
        if not tag >> 3:
            raise WireError(f"field number 0 before byte {position}")
        raw, position = _take(data, position, tag & 7)
        field = table.get(tag >> 3)
        if field is None:
            continue
        if field.label == "map":
            key, value = _decode_entry(field, raw, depth, allowance)
            getattr(message, field.name)[key] = value
        elif field.label == "repeated":
            if field.kind in _INT_RANGES and isinstance(raw, bytes):
                packed = _decode_packed(field.kind, raw, allowance)
                getattr(message, field.name).extend(packed)
            else:
                allowance.take()
                item = _decode_value(field.kind, field.name, field.message, raw, depth, allowance)
                getattr(message, field.name).append(item)
        else:
            value = _decode_value(field.kind, field.name, field.message, raw, depth, allowance)
            setattr(message, field.name, value)
    return message
