"""JSON bodies of requests: read with a limit, then checked field by field.

Every refusal names the field and what it takes. Bounds: 1 MiB, depth 32, 10,000 values, no NUL and
no lone surrogates in text (neither can go into an environment, a label or a database), UTF-8 only,
no name twice in one object, no number that is infinite (RFC 8259 § 4, § 6, § 8.1).
"""

from __future__ import annotations

import json
import math
from typing import Protocol

import falcon

from vmcell_protos.errors import CallerError

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000


class Readable(Protocol):
    """A body; an empty answer is its end."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes."""


class BodyTooLarge(CallerError):
    """The body has more than 1 MiB; answered with 413."""


def request_json(req: falcon.Request) -> dict[str, object]:
    """The request's JSON object; {} without a body. Raises CallerError."""
    stream = request_stream(req)
    return {} if stream is None else read_json(stream, req.content_length)


def request_stream(req: falcon.Request) -> Readable | None:
    """The body, which ends by itself; None when there is none.

    JavaScript SDKs send bodies chunked, without a length.
    """
    if req.content_length is not None:
        return req.bounded_stream
    return req.stream if req.env.get("wsgi.input_terminated") else None


def read_json(stream: Readable, content_length: int | None) -> dict[str, object]:
    """The JSON object of a body; {} for an empty one.

    `stream` must end with the body (chunked bodies have no length). Raises CallerError.
    """
    if content_length is not None and content_length > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has {content_length} bytes; at most {MAX_BODY_BYTES}")
    data = bytearray()
    while len(data) <= MAX_BODY_BYTES:
        try:
            part = stream.read(min(65536, MAX_BODY_BYTES + 1 - len(data)))
        except OSError as error:  # the client left, or waited too long
            raise CallerError("the body is cut short; send it again") from error
        if not part:
            return parse_json(bytes(data))
        data += part
    raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")


def parse_json(data: bytes) -> dict[str, object]:
    """The JSON object in `data`, checked against the bounds; raises CallerError."""
    if not data.strip():
        return {}
    try:
        value = json.loads(
            data.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        raise CallerError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CallerError(f"the body is a JSON {type(value).__name__}; send an object")
    _check_bounds(value)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """What stands there twice is meant differently by whom it is read next."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it names {name[:40]!r} twice")
            seen.add(name)
    return value


def _check_bounds(root: object) -> None:
    count = 0
    level = [root]
    for _ in range(MAX_DEPTH):
        following: list[object] = []
        for value in level:
            count += 1
            if isinstance(value, dict):
                following += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                following += value
            elif isinstance(value, str):
                _check_text(value)
        if count + len(following) > MAX_VALUES * 2:
            raise CallerError(f"the body has more than {MAX_VALUES} values")
        if not following:
            return
        level = following
    raise CallerError(f"the body is nested more than {MAX_DEPTH} levels deep")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise CallerError(f"text {text[:40]!r} holds a NUL character; leave it out")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CallerError(f"text {text[:40]!r} is not valid Unicode") from error


def text_field(body: dict[str, object], name: str, *, max_length: int, prefix: str = "") -> str:
    """A required, non-empty string."""
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= max_length:
        raise CallerError(
            f"{prefix}{name} is {_shown(value)}; it takes 1 to {max_length} characters"
        )
    return value


def int_field(body: dict[str, object], name: str, *, default: int, bounds: range) -> int:
    """A whole number within `bounds`, `default` when absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value not in bounds:
        raise CallerError(
            f"{name} is {_shown(value)}; it takes a whole number from {bounds[0]} to {bounds[-1]}"
        )
    return value


def bool_field(body: dict[str, object], name: str, *, default: bool, prefix: str = "") -> bool:
    """True or false, `default` when absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CallerError(f"{prefix}{name} is {_shown(value)}; it takes true or false")
    return value


def text_list_field(body: dict[str, object], name: str, *, prefix: str = "") -> list[str]:
    """A list of strings, [] when absent or null."""
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise CallerError(f"{prefix}{name} is {_shown(value)}; it takes a list of strings")
    for item in value:
        if not isinstance(item, str):
            raise CallerError(f"{prefix}{name} holds {_shown(item)}; it takes strings")
    return value


def text_map_field(body: dict[str, object], name: str) -> dict[str, str]:
    """An object of strings, {} when absent or null."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CallerError(f"{name} is {_shown(value)}; it takes an object of strings")
    for key, item in value.items():
        if not isinstance(item, str):
            raise CallerError(f"{name}[{key[:40]!r}] is {_shown(item)}; it takes a string")
    return value


def _shown(value: object) -> str:
    """The value in a message: short, and "absent" for None."""
    return "absent" if value is None else repr(value)[:60]
