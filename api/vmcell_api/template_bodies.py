"""Bodies and queries of the template routes, from E2B's JSON names to checked records."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from vmcell_api.build_client import NewStep
from vmcell_api.json_body import bool_field, int_field, text_field
from vmcell_api.query_numbers import query_number
from vmcell_api.template_names import DEFAULT_TAG, TemplateName, parse_name, parse_tags
from vmcell_protos.errors import CallerError

DEFAULT_VCPUS, DEFAULT_MEMORY_MIB = 1, 512
VCPUS, MEMORY_MIB = range(1, 9), range(128, 65537)
MAX_COMMAND_CHARACTERS = 65536
MAX_LOG_PAGE = 100
MAX_LOG_OFFSET = 10**9
MAX_NAME_TEXT = 400  # with namespace and tag
LEVELS = ("debug", "info", "warn", "error")
STEP_TYPES = ("COPY", "RUN", "ENV", "WORKDIR", "USER")
MAX_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class TemplateRequest:
    """`POST /v3/templates`; `tags` are those that the build is to have, never empty."""

    name: TemplateName
    tags: list[str]
    vcpus: int
    memory_mib: int


@dataclass(frozen=True, kw_only=True)
class BuildStart:
    """`POST /v2/templates/{id}/builds/{id}`; one of `from_image`, `from_template` is set."""

    from_image: str
    from_template: str
    username: str = ""
    password: str = field(default="", repr=False)
    steps: list[NewStep]
    force: bool
    start_command: str
    ready_command: str


@dataclass(frozen=True, kw_only=True)
class LogQuery:
    """Which entries of a build's log: from `offset` on, `limit` at most, `level` and worse."""

    offset: int = 0
    limit: int = MAX_LOG_PAGE
    level: str = "debug"


def parse_template_request(body: dict[str, object]) -> TemplateRequest:
    """The body of `POST /v3/templates`; `alias` is its older name. Raises CallerError."""
    field_name = "name" if body.get("name") or not body.get("alias") else "alias"
    name = parse_name(text_field(body, field_name, max_length=MAX_NAME_TEXT))
    if body.get("minFreeDiskMb"):
        raise CallerError(
            "this server does not have minFreeDiskMb: a sandbox's disk grows with what is written, "
            "up to the node's disk_mib; leave it out"
        )
    tags = parse_tags(body.get("tags"))
    if name.tag:
        tags = [name.tag, *(tag for tag in tags if tag != name.tag)]
    return TemplateRequest(
        name=name,
        tags=tags or [DEFAULT_TAG],
        vcpus=int_field(body, "cpuCount", default=DEFAULT_VCPUS, bounds=VCPUS),
        memory_mib=int_field(body, "memoryMB", default=DEFAULT_MEMORY_MIB, bounds=MEMORY_MIB),
    )


def parse_build_start(body: dict[str, object]) -> BuildStart:
    """The body of a build's start; raises CallerError."""
    image, template = _optional(body, "fromImage"), _optional(body, "fromTemplate")
    if bool(image) == bool(template):
        raise CallerError("give one of fromImage and fromTemplate")
    steps = [] if body.get("steps") is None else body["steps"]
    if not isinstance(steps, list) or len(steps) > MAX_STEPS:
        raise CallerError(f"steps takes a list of at most {MAX_STEPS} steps")
    username, password = _registry(body.get("fromImageRegistry"))
    return BuildStart(
        from_image=image,
        from_template=template,
        username=username,
        password=password,
        steps=[_step(number, step) for number, step in enumerate(steps, start=1)],
        force=bool_field(body, "force", default=False),
        start_command=_optional(body, "startCmd"),
        ready_command=_optional(body, "readyCmd"),
    )


def _optional(body: dict[str, object], name: str) -> str:
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_COMMAND_CHARACTERS:
        raise CallerError(f"{name} takes text of at most {MAX_COMMAND_CHARACTERS} characters")
    return value


def _step(number: int, step: object) -> NewStep:
    where = f"steps[{number - 1}]"
    if not isinstance(step, dict):
        raise CallerError(f"{where} takes an object")
    kind, args = step.get("type"), [] if step.get("args") is None else step["args"]
    if kind not in STEP_TYPES:
        raise CallerError(f"{where}.type is {str(kind)[:40]!r}; it takes {', '.join(STEP_TYPES)}")
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise CallerError(f"{where}.args takes a list of strings")
    return NewStep(
        type=str(kind),
        args=args,
        files_hash=_optional(step, "filesHash"),
        force=bool_field(step, "force", default=False, prefix=f"{where}."),
    )


def _registry(login: object) -> tuple[str, str]:
    """User and password for the registry of the image; ("", "") when none are given."""
    if login is None:
        return "", ""
    if not isinstance(login, dict):
        raise CallerError("fromImageRegistry takes an object")
    kind, prefix = login.get("type"), "fromImageRegistry."
    if kind == "registry":
        return (
            text_field(login, "username", max_length=256, prefix=prefix),
            text_field(login, "password", max_length=4000, prefix=prefix),
        )
    if kind == "gcp":
        account = text_field(login, "serviceAccountJson", max_length=16384, prefix=prefix)
        try:
            # The registry's own convention: this user, the key file as the password, on one line.
            return "_json_key", json.dumps(json.loads(account), separators=(",", ":"))
        except (ValueError, RecursionError) as error:
            raise CallerError("fromImageRegistry.serviceAccountJson is not JSON") from error
    raise CallerError(
        f"fromImageRegistry.type is {str(kind)[:40]!r}; this server has registry and gcp. For aws, "
        "give a registry login of user AWS with the password of `aws ecr get-login-password`"
    )


def parse_log_query(query_string: str, *, offset_name: str = "logsOffset") -> LogQuery:
    """The query of a build's status or logs; raises CallerError."""
    query = dict(parse_qsl(query_string))
    level = query.get("level") or "debug"
    if level not in LEVELS:
        raise CallerError(f"level is {level[:20]!r}; it takes {', '.join(LEVELS)}")
    return LogQuery(
        offset=_number(query, offset_name, 0),
        limit=min(_number(query, "limit", MAX_LOG_PAGE), MAX_LOG_PAGE),
        level=level,
    )


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    return query_number(name, text, range(MAX_LOG_OFFSET + 1)) if text else default


def parse_tag_target(body: dict[str, object]) -> tuple[TemplateName, list[str]]:
    """`POST /templates/tags`: which build, by name and tag, and its new tags."""
    target = parse_name(text_field(body, "target", max_length=MAX_NAME_TEXT))
    return target, _some_tags(body)


def parse_tag_removal(body: dict[str, object]) -> tuple[TemplateName, list[str]]:
    """`DELETE /templates/tags`: which template loses which tags."""
    name = parse_name(text_field(body, "name", max_length=MAX_NAME_TEXT))
    return name, _some_tags(body)


def _some_tags(body: dict[str, object]) -> list[str]:
    tags = parse_tags(body.get("tags"))
    if not tags:
        raise CallerError("tags is empty; name at least one tag")
    return tags


def parse_public(body: dict[str, object]) -> bool:
    """`PATCH`: whether other teams may use the template."""
    if body.get("public") is None:
        raise CallerError("public is absent; it takes true or false")
    return bool_field(body, "public", default=False)
