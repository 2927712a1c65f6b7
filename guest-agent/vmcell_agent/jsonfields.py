"""Typed reads from parsed JSON: a wrong type is one sentence with the field's path.

The host's shim is trusted, but what it forwards was written by whoever wrote the OCI spec.
"""

from __future__ import annotations

import json

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_JSON_BYTES = 1 << 20


def parse_object(data: bytes, what: str) -> Object:
    """The JSON object in `data`, at most 1 MiB; raises CallerError."""
    if len(data) > MAX_JSON_BYTES:
        raise CallerError(f"{what} has {len(data)} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CallerError(f"{what} is not JSON: {error}") from error
    return Object(_of_type(value, dict, what, "an object"), what)


def _check_text(value: str, path: str) -> str:
    """What no system call takes: a NUL byte, half a surrogate pair."""
    if "\0" in value:
        raise CallerError(f"{path} contains a NUL byte")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CallerError(f"{path} is not valid Unicode") from error
    return value


def _of_type(value: Any, kind: type, path: str, name: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CallerError(f"{path} must be {name}, not {type(value).__name__}")
    return value


class Object:
    """A JSON object and its path; `null` counts as absent, as Go's encoder writes it."""

    __slots__ = ("_fields", "path")

    def __init__(self, fields: dict[str, Any], path: str) -> None:
        self._fields = fields
        self.path = path

    def _get(self, key: str, kind: type, name: str) -> Any:
        value = self._fields.get(key)
        return None if value is None else _of_type(value, kind, f"{self.path}.{key}", name)

    def has(self, key: str) -> bool:
        """Whether the field says anything: absent, null, empty and false do not."""
        return bool(self._fields.get(key))

    def text(self, key: str, default: str = "") -> str:
        value = self._get(key, str, "a string")
        return default if value is None else _check_text(value, f"{self.path}.{key}")

    def flag(self, key: str) -> bool:
        return bool(self._get(key, bool, "true or false"))

    def number(self, key: str, low: int, high: int) -> int | None:
        value = self._get(key, int, "a whole number")
        if value is None:
            return None
        if not low <= value <= high:
            raise CallerError(f"{self.path}.{key} is {value}; it must be {low} to {high}")
        return int(value)

    def object(self, key: str) -> Object:
        value = self._get(key, dict, "an object")
        return Object(value or {}, f"{self.path}.{key}")

    def objects(self, key: str) -> list[Object]:
        rows = self._get(key, list, "a list") or []
        path = f"{self.path}.{key}"
        return [
            Object(_of_type(row, dict, f"{path}[{index}]", "an object"), f"{path}[{index}]")
            for index, row in enumerate(rows)
        ]

    def texts(self, key: str) -> list[str]:
        rows = self._get(key, list, "a list") or []
        for index, row in enumerate(rows):
            _of_type(row, str, f"{self.path}.{key}[{index}]", "a string")
            _check_text(row, f"{self.path}.{key}[{index}]")
        return list(rows)

    def numbers(self, key: str, low: int, high: int) -> list[int]:
        rows = self._get(key, list, "a list") or []
        for index, row in enumerate(rows):
            path = f"{self.path}.{key}[{index}]"
            _of_type(row, int, path, "a whole number")
            if not low <= row <= high:
                raise CallerError(f"{path} is {row}; it must be {low} to {high}")
        return list(rows)

    def text_map(self, key: str) -> dict[str, str]:
        rows = self._get(key, dict, "an object") or {}
        for name, value in rows.items():
            path = f"{self.path}.{key}[{name!r}]"
            _check_text(_of_type(value, str, path, "a string"), path)
            _check_text(name, path)
        return dict(rows)
