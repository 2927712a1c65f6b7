"""Bodies of requests: JSON objects with bounds, as frozen records. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_BODY_BYTES = 64 << 20
MAX_VARIABLES = 10_000
# A terminal takes no longer line, and bash's kernel sends it its code by one.
SHELL_LINE_BYTES = 4095
SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class RequestError(Exception):
    """What the client did wrong: an HTTP status and one sentence for the body."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True, kw_only=True)
class ExecuteRequest:
    """`POST /execute`; at most one of `context_id` and `language` is set."""

    code: str
    context_id: str | None = None
    language: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ContextRequest:
    """`POST /contexts`; what is None has a default."""

    language: str | None = None
    cwd: str | None = None


def parse_execute(body: bytes) -> ExecuteRequest:
    """The request in `body`; null stands for absent. Raises RequestError 400."""
    table = _table(body)
    code = _text(table, "code")
    if code is None:
        raise RequestError(400, "field 'code' is missing: it takes the code to run, a string")
    request = ExecuteRequest(
        code=code,
        context_id=_text(table, "context_id") or None,
        language=_text(table, "language") or None,
        environment=_environment(table.get("env_vars")),
    )
    if request.context_id and request.language:
        raise RequestError(
            400, "only one of context_id and language can be given: a context has its language"
        )
    return request


def parse_context(body: bytes) -> ContextRequest:
    """The request in `body`, which may be empty. Raises RequestError 400."""
    table = _table(body) if body.strip() else {}
    cwd = _text(table, "cwd") or None
    if cwd is not None and "\0" in cwd:
        raise RequestError(400, "field 'cwd' has a NUL byte in it; give a path")
    return ContextRequest(language=_text(table, "language") or None, cwd=cwd)


def check_for_shell(request: ExecuteRequest) -> None:
    """Raises RequestError 400 for what bash's kernel cannot be told."""
    for name, text in request.environment.items():
        if not SHELL_NAME.fullmatch(name):
            raise RequestError(400, f"{name[:60]!r} is no name of a variable in bash")
        if len(text.encode()) * 4 + len(name) > SHELL_LINE_BYTES - 60:
            raise RequestError(400, f"env_vars[{name[:60]!r}] is too long for bash's kernel")
    for number, row in enumerate(request.code.splitlines(), 1):
        if len(row.encode()) > SHELL_LINE_BYTES:
            raise RequestError(
                400,
                f"line {number} of the code is longer than the {SHELL_LINE_BYTES} bytes that "
                "bash's kernel takes; put what is long into a file",
            )


def _table(body: bytes) -> dict[str, object]:
    try:
        table = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise RequestError(400, f"the body is a JSON {_kind(table)}; it takes an object")
    return table


def _text(table: Mapping[str, object], name: str) -> str | None:
    value = table.get(name)
    if value is None:
        return None
    return _checked_text(value, f"field {name!r}")


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(400, f"{where} is a JSON {_kind(value)}; it takes a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # kernels are sent UTF-8, and half of a surrogate pair has none
        raise RequestError(400, f"{where} is not Unicode text: {error.reason}") from error
    return value


def _environment(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(400, f"field 'env_vars' is a JSON {_kind(value)}; it takes an object")
    if len(value) > MAX_VARIABLES:
        raise RequestError(400, f"env_vars has {len(value)} entries; at most {MAX_VARIABLES}")
    environment = {}
    for name, content in value.items():
        _checked_text(name, "a name in env_vars")
        if not name or "=" in name or "\0" in name:
            raise RequestError(400, f"{name[:60]!r} is no name of an environment variable")
        text = _checked_text(content, f"env_vars[{name[:60]!r}]")
        if "\0" in text:
            raise RequestError(400, f"env_vars[{name[:60]!r}] has a NUL byte in it")
        environment[name] = text
    return environment


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
