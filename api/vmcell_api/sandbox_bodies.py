"""Bodies and queries of the sandbox routes, from E2B's JSON names to checked records.

Options that this server does not have are refused by name: ignoring one would promise a sandbox
that is not what was asked for. Fields that are unknown to E2B are ignored, as E2B does.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from vmcell_api.json_body import bool_field, int_field, text_field, text_map_field
from vmcell_api.network_rules import ANY_NETWORK, NetworkWish, parse_network
from vmcell_api.page_cursor import decode_cursor
from vmcell_api.query_numbers import query_number
from vmcell_api.volumes.names import MAX_MOUNT_PATH, check_mount_paths, check_volume_name
from vmcell_protos.errors import CallerError

DEFAULT_TIMEOUT_V1_S = 15
DEFAULT_TIMEOUT_V2_S = 300
# cubesandbox: a sandbox without an end. noded takes 400 days at most, so that is when it ends.
NO_END = -1
NO_END_S = 400 * 24 * 3600
MAX_REFRESH_S = 3600
MAX_TEMPLATE_LENGTH = 512
MAX_PAGE = 100
STATES = ("running", "paused")
# What is not planned for here.
UNSUPPORTED_OPTIONS = ("mcp", "iam", "distributionScope")
_ROW_ID = re.compile(r"[a-z0-9]{20}")


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """A volume of that name at an absolute path of the guest."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class CreateBody:
    """A create as the client wants it; `secured`: envd asks for a token."""

    template: str
    timeout_s: int
    secured: bool
    network: NetworkWish = ANY_NETWORK
    metadata: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    volume_mounts: tuple[tuple[str, str], ...] = ()  # (volume's name, path)
    pause_on_timeout: bool = False
    auto_resume: bool = False


@dataclass(frozen=True, kw_only=True)
class ListQuery:
    """Which sandboxes, in which order; `after` is the cursor (started_at_unix_ms, id)."""

    metadata: dict[str, str] = field(default_factory=dict)
    states: tuple[str, ...] = STATES
    ascending: bool = False
    started_after_unix_ms: int = 0
    template: str = ""
    limit: int = MAX_PAGE
    after: tuple[int, str] | None = None


def parse_create(
    body: dict[str, object], *, version: int, max_timeout_s: int, allow_no_end: bool = False
) -> CreateBody:
    """The body of `POST /sandboxes` (version 1) or `POST /v2/sandboxes`; raises CallerError."""
    _refuse_missing_options(body)
    environment = text_map_field(body, "envVars")
    for name in environment:
        if not name or "=" in name:
            raise CallerError(f"envVars names a variable {name[:40]!r}; use names without '='")
    secured = version != 1 or bool_field(body, "secure", default=False)
    network = parse_network(body)
    if not secured and not network.is_public:
        raise CallerError("network.allowPublicTraffic is false, which needs secure: true")
    pause_on_timeout, auto_resume = _parse_lifecycle(body)
    volume_mounts = parse_volume_mounts(body)
    if pause_on_timeout and volume_mounts:
        raise CallerError(
            "autoPause and volumeMounts do not go together: a sandbox with volumes, which are live "
            "directories of the host, cannot be saved"
        )
    return CreateBody(
        template=text_field(body, "templateID", max_length=MAX_TEMPLATE_LENGTH),
        timeout_s=_create_timeout(
            body, version=version, max_timeout_s=max_timeout_s, allow_no_end=allow_no_end
        ),
        secured=secured,
        network=network,
        metadata=text_map_field(body, "metadata"),
        environment=environment,
        volume_mounts=volume_mounts,
        pause_on_timeout=pause_on_timeout,
        auto_resume=auto_resume,
    )


def _create_timeout(
    body: dict[str, object], *, version: int, max_timeout_s: int, allow_no_end: bool
) -> int:
    value = body.get("timeout")
    if value == NO_END and isinstance(value, int):
        if not allow_no_end:
            raise CallerError(
                f"timeout is -1, but this server ends every sandbox; at most {max_timeout_s} s"
            )
        return NO_END_S
    default_s = DEFAULT_TIMEOUT_V1_S if version == 1 else DEFAULT_TIMEOUT_V2_S
    return parse_timeout(body, default=default_s, max_timeout_s=max_timeout_s, lowest=1)


def parse_volume_mounts(body: dict[str, object]) -> tuple[tuple[str, str], ...]:
    """The field `volumeMounts` as (name, normal path) pairs; raises CallerError."""
    rows = body.get("volumeMounts")
    if rows is None:
        return ()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CallerError("volumeMounts takes a list of objects with name and path")
    names, paths = [], []
    for number, row in enumerate(rows):
        try:
            names.append(check_volume_name(text_field(row, "name", max_length=128)))
            paths.append(text_field(row, "path", max_length=MAX_MOUNT_PATH))
        except CallerError as error:
            raise CallerError(f"volumeMounts[{number}]: {error}") from error
    return tuple(zip(names, check_mount_paths(paths), strict=True))


def parse_timeout(
    body: dict[str, object], *, default: int, max_timeout_s: int, lowest: int = 0
) -> int:
    """The field `timeout` in seconds; raises CallerError."""
    bounds = range(lowest, max_timeout_s + 1)
    return int_field(body, "timeout", default=min(default, max_timeout_s), bounds=bounds)


def parse_required_timeout(body: dict[str, object], max_timeout_s: int) -> int:
    """`timeout` of `POST /sandboxes/{id}/timeout`, where it may not be left out."""
    if body.get("timeout") is None:
        raise CallerError("timeout is absent; give the seconds from now, 0 to end it at once")
    return parse_timeout(body, default=0, max_timeout_s=max_timeout_s)


def _refuse_missing_options(body: dict[str, object]) -> None:
    wanted = [name for name in UNSUPPORTED_OPTIONS if body.get(name)]
    if body.get("autoPauseMemory") is False:
        wanted.append("autoPauseMemory")
    if wanted:
        raise CallerError(f"this server does not have {', '.join(wanted)}; leave it out")


def _parse_lifecycle(body: dict[str, object]) -> tuple[bool, bool]:
    """(pause instead of kill at the end, resume by requests) of E2B's and cubesandbox's fields."""
    lifecycle = body.get("lifecycle")
    if lifecycle is None:
        lifecycle = {}
    if not isinstance(lifecycle, dict):
        raise CallerError("lifecycle takes an object")
    on_timeout = lifecycle.get("onTimeout")
    if on_timeout not in (None, "kill", "pause"):
        raise CallerError(
            f"lifecycle.onTimeout is {str(on_timeout)[:40]!r}; it takes kill or pause"
        )
    pauses = bool_field(body, "autoPause", default=on_timeout == "pause")
    resumes = _auto_resume(body) or _auto_resume(lifecycle)
    return pauses, resumes


def _auto_resume(body: dict[str, object]) -> bool:
    """A flag, or E2B's object with the flag `enabled`."""
    value = body.get("autoResume")
    if isinstance(value, dict):
        return bool_field(value, "enabled", default=False, prefix="autoResume.")
    return bool_field(body, "autoResume", default=False)


def parse_list_query(query_string: str) -> ListQuery:
    """The query of `GET /v2/sandboxes`; raises CallerError."""
    query: dict[str, str] = {}
    for name, value in parse_qsl(query_string, keep_blank_values=True):
        if name in query and name == "state":  # repeated instead of joined by commas
            query[name] += f",{value}"
        else:
            query[name] = value
    states = tuple(filter(None, query.get("state", "").split(","))) or STATES
    for state in states:
        if state not in STATES:
            raise CallerError(f"state is {state[:40]!r}; it takes {' or '.join(STATES)}")
    order = query.get("order") or "desc"
    if order not in ("asc", "desc"):
        raise CallerError(f"order is {order[:40]!r}; it takes asc or desc")
    token = query.get("nextToken", "")
    return ListQuery(
        metadata=parse_metadata_query(query.get("metadata", "")),
        states=states,
        ascending=order == "asc",
        started_after_unix_ms=_unix_ms(query.get("startedAfter", "")),
        template=query.get("template", ""),
        limit=parse_page_size(query.get("limit", "")),
        after=decode_cursor(token, _ROW_ID) if token else None,
    )


def parse_metadata_query(value: str) -> dict[str, str]:
    """The pairs of a `metadata` parameter that was decoded once already.

    SDKs quote keys and values, then the form, then the parameter: two decodings are left.
    """
    return {unquote(key): unquote(item) for key, item in parse_qsl(value, keep_blank_values=True)}


def parse_page_size(text: str) -> int:
    """The query parameter `limit`, 100 when empty; raises CallerError."""
    return query_number("limit", text, range(1, MAX_PAGE + 1)) if text else MAX_PAGE


def _unix_ms(text: str) -> int:
    if not text:
        return 0
    try:
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise CallerError(f"startedAfter is {text[:40]!r}; it takes an RFC 3339 time") from error
