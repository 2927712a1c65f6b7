"""Reading messages field by field: proto3 JSON, or what the codec made of protobuf's bytes.

Names are lowerCamelCase, snake_case is understood too, null means absent, unknown fields are
ignored (protobuf's JSON mapping). Every misfit raises CallerError invalid_argument.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Iterable

from vmcell_protos.errors import CallerError

_UINT32_MAX = 0xFFFF_FFFF


def parse_message(body: bytes) -> Fields:
    """The JSON object in `body`; an empty body is the empty message, as connect-go reads it."""
    if not body:
        return Fields({})
    try:
        # Bytes would make json guess at UTF-16 and UTF-32, which JSON of proto3 never is.
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CallerError(f"cannot read the message as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CallerError("cannot read the message: it is no JSON object")
    return Fields(value)


def _base64_text(value: object) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return binascii.b2a_base64(value, newline=False).decode("ascii")


def dump_message(message: dict[str, object]) -> bytes:
    """`message` as compact JSON, bytes as base64; file names that are no UTF-8 get U+FFFD."""
    text = json.dumps(message, separators=(",", ":"), ensure_ascii=False, default=_base64_text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return clean_text(text).encode("utf-8")


def clean_text(text: str) -> str:
    """`text` with lone surrogates, which stand for raw bytes of names (PEP 383), as U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def octets_of(value: object) -> bytes | None:
    """`bytes` as they are, or base64, standard or URL-safe, padded or not; None for all else."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return None
    text = value.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except (binascii.Error, ValueError):
        return None


class Fields:
    """One message; each method reads a field of one proto type, `where` names it in errors."""

    __slots__ = ("_values", "_where")

    def __init__(self, values: dict[str, object], where: str = "") -> None:
        self._values = values
        self._where = where

    def _get(self, name: str) -> object:
        value = self._values.get(name)
        if value is None:
            snake = "".join("_" + c.lower() if c.isupper() else c for c in name)
            value = self._values.get(snake)
        return value

    def _misfit(self, name: str, wanted: str) -> CallerError:
        return CallerError(f"field {self._where}{name} must be {wanted}")

    def has(self, name: str) -> bool:
        return self._get(name) is not None

    def optional_text(self, name: str) -> str | None:
        value = self._get(name)
        if value is None:
            return None
        return self._checked_text(name, value)

    def text(self, name: str) -> str:
        return self.optional_text(name) or ""

    def _checked_text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._misfit(name, "a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self._misfit(name, "valid Unicode") from None
        if "\0" in value:
            raise self._misfit(name, "free of NUL characters")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._misfit(name, "a list of strings")
        return [self._checked_text(name, item) for item in value]

    def text_map(self, name: str) -> dict[str, str]:
        value = self._get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._misfit(name, "an object of strings")
        return {
            self._checked_text(name, key): self._checked_text(name, item)
            for key, item in value.items()
        }

    def optional_boolean(self, name: str) -> bool | None:
        value = self._get(name)
        if value is None or isinstance(value, bool):
            return value
        raise self._misfit(name, "true or false")

    def boolean(self, name: str) -> bool:
        return bool(self.optional_boolean(name))

    def optional_uint32(self, name: str) -> int | None:
        """A number, or its decimal text; 3.0 is 3."""
        value = self._get(name)
        if value is None:
            return None
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:11])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _UINT32_MAX:
            raise self._misfit(name, "a whole number from 0 to 4294967295")
        return value

    def uint32(self, name: str) -> int:
        return self.optional_uint32(name) or 0

    def octets(self, name: str) -> bytes:
        value = self._get(name)
        if value is None:
            return b""
        found = octets_of(value)
        if found is None:
            raise self._misfit(name, "base64 text")
        return found

    def enum(self, name: str, numbers: dict[str, int]) -> int:
        """An enum by name or number; an unknown name is refused, an unknown number kept."""
        value = self._get(name)
        if value is None:
            return 0
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value in numbers:
            return numbers[value]
        raise self._misfit(name, "one of " + ", ".join(numbers))

    def optional_message(self, name: str) -> Fields | None:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._misfit(name, "an object")
        return Fields(value, f"{self._where}{name}.")

    def message(self, name: str) -> Fields:
        return self.optional_message(name) or Fields({}, f"{self._where}{name}.")

    def which(self, names: Iterable[str]) -> str | None:
        """The one member of a oneof that is set, None when none is."""
        present = [name for name in names if self.has(name)]
        if len(present) > 1:
            raise CallerError(f"fields {self._where}{' and '.join(present)} exclude each other")
        return present[0] if present else None
