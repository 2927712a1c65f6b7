"""Connect's two codecs: a request's bytes to Fields, an answer's values to bytes.

envd holds messages as dicts of proto3 JSON's shape, in which `bytes` values may stay bytes. With
`json` they are written as they are; with `proto` the tables generated from E2B's `.proto` files say
number and kind of each field.
"""

from __future__ import annotations

from typing import Protocol

from vmcell_protos import envd_filesystem, envd_process
from vmcell_protos.wellknown import Timestamp
from vmcell_protos.wire import Field, Message

from .fields import Fields, clean_text, dump_message, octets_of, parse_message
from .gotext import unix_ns

Values = dict[str, object]

# "FileType_FILE_TYPE_FILE" is how the generated modules name a constant; no name is in two enums.
_ENUMS: dict[str, int] = {
    name.partition("_")[2]: number
    for module in (envd_filesystem, envd_process)
    for name, number in vars(module).items()
    if isinstance(number, int)
}
_INTEGERS = ("uint32", "uint64", "int32", "int64", "sint32", "sint64")


class Codec(Protocol):
    """How messages are written; `unary_type` and `stream_type` are the content types for it."""

    name: str
    unary_type: str
    stream_type: str

    def parse(self, shape: type[Message], body: bytes) -> Fields:
        """Raises CallerError invalid_argument."""

    def dump(self, shape: type[Message], values: Values) -> bytes: ...


class JsonCodec:
    """proto3's JSON mapping."""

    name = "json"
    unary_type = "application/json"
    stream_type = "application/connect+json"

    def parse(self, shape: type[Message], body: bytes) -> Fields:
        return parse_message(body)

    def dump(self, shape: type[Message], values: Values) -> bytes:
        return dump_message(values)


class ProtoCodec:
    """protobuf's wire format."""

    name = "proto"
    unary_type = "application/proto"
    stream_type = "application/connect+proto"

    def parse(self, shape: type[Message], body: bytes) -> Fields:
        return Fields(message_values(shape.decode(body)))

    def dump(self, shape: type[Message], values: Values) -> bytes:
        return build_message(shape, values).encode()


JSON = JsonCodec()
PROTO = ProtoCodec()


def _json_name(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def message_values(message: Message) -> Values:
    """What of a request is set, by JSON names; bytes and enum numbers stay what they are."""
    values: Values = {}
    for field in message.FIELDS:
        value = getattr(message, field.name)
        if value is None or (not value and field.label != "optional" and field.kind != "message"):
            continue
        if field.kind == "message" and field.label == "repeated":
            value = [message_values(item) for item in value]
        elif isinstance(value, Message):
            value = message_values(value)
        values[_json_name(field.name)] = value
    return values


_known_names: dict[type[Message], dict[str, Field]] = {}


def _fields_by_name(shape: type[Message]) -> dict[str, Field]:
    names = _known_names.get(shape)
    if names is None:
        names = {_json_name(field.name): field for field in shape.FIELDS}
        _known_names[shape] = names
    return names


def build_message(shape: type[Message], values: Values) -> Message:
    """The inverse, for answers of our own; names that `shape` does not have are a bug: KeyError."""
    by_name = _fields_by_name(shape)
    return shape(
        **{by_name[name].name: _field_value(by_name[name], value) for name, value in values.items()}
    )


def _field_value(field: Field, value: object) -> object:
    if field.label == "repeated":
        assert isinstance(value, list)
        return [_one_value(field, item) for item in value]
    if field.label == "map":
        assert isinstance(value, dict)
        return {clean_text(key): _one_value(field, item) for key, item in value.items()}
    return _one_value(field, value)


def _one_value(field: Field, value: object) -> object:
    if field.kind == "message":
        assert field.message is not None
        if isinstance(value, str):
            seconds, nanos = divmod(unix_ns(value), 1_000_000_000)
            return Timestamp(seconds=seconds, nanos=nanos)
        assert isinstance(value, dict)
        return build_message(field.message, value)
    if field.kind == "string":
        assert isinstance(value, str)
        return clean_text(value)
    if field.kind == "bytes":
        return octets_of(value)
    if field.kind in _INTEGERS and isinstance(value, str):
        # An enum by name, or a 64-bit number as JSON has it.
        return _ENUMS[value] if value in _ENUMS else int(value)
    return value
