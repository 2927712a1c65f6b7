"""config.json as containerd writes it: read with a size limit, taken apart with a name for blame.

The document comes from whoever may talk to containerd; every field is checked where it is taken,
and the error names it the way the OCI runtime specification does ("linux.resources.cpu.quota").
"""

from __future__ import annotations

import json
import re

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Json = dict[str, Any]

LIMIT_BYTES = 2 << 20

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# What a kind is called in an error sentence.
_KIND_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def read_object(path: str) -> Json:
    """The JSON object in the file; raises CallerError when it is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise CallerError(f"cannot read the OCI spec {path}: {error}") from error
    return parse_object(data, path)


def parse_object(data: bytes, name: str) -> Json:
    """The JSON object in `data`; `name` is what the error calls it. Raises CallerError."""
    if len(data) > LIMIT_BYTES:
        raise CallerError(f"{name} is larger than {LIMIT_BYTES} bytes; make the spec smaller")
    try:
        value = json.loads(data)
        _check_strings(value, name)
    except RecursionError as error:
        raise CallerError(f"{name} is nested too deeply to be an OCI spec") from error
    except ValueError as error:
        raise CallerError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CallerError(f"{name} holds no JSON object; an OCI spec is one")
    return value


def _check_strings(value: Any, name: str) -> None:
    """CallerError for a string that can be neither a path nor UTF-8: JSON's escapes can say both a
    zero byte and half a character."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_strings(key, name)
            _check_strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner, name)
    elif isinstance(value, str) and _NO_TEXT.search(value):
        raise CallerError(f"{name} holds {value[:60]!a}, which is no text; correct the spec")


def take(spec: Json, path: str, kind: type, default: Any) -> Any:
    """The value at the dotted `path`, `default` when it or a parent is absent or null.

    Raises CallerError when something on the way is of another kind.
    """
    value: Any = spec
    names = path.split(".")
    for depth, name in enumerate(names):
        value = value.get(name)
        if value is None:
            return default
        expected = kind if depth == len(names) - 1 else dict
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            where = ".".join(names[: depth + 1])
            raise CallerError(
                f"config.json: {where} is {str(value)[:60]!r}; it must be {_KIND_NAMES[expected]}"
            )
    return value


def take_rows(spec: Json, path: str) -> list[Json]:
    """The list of objects at `path`; raises CallerError when an item is no object."""
    rows = take(spec, path, list, [])
    for row in rows:
        if not isinstance(row, dict):
            raise CallerError(f"config.json: {path} holds {str(row)[:60]!r}; it must hold objects")
    return list(rows)


def take_strings(row: Json, path: str) -> list[str]:
    """The list of strings at `path`; raises CallerError when an item is no string."""
    items = take(row, path, list, [])
    for item in items:
        if not isinstance(item, str):
            raise CallerError(f"config.json: {path} holds {str(item)[:60]!r}; it must hold strings")
    return list(items)
