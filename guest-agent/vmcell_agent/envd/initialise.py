"""`POST /init`: the control plane's word on token, environment, defaults and clock."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime

from vmcell_protos.errors import CallerError

from .exchange import Exchange, HttpError, WholeBody
from .settings import Settings
from .wire.fields import Fields, parse_message

_MAX_BODY_BYTES = 4 * 1024 * 1024
# Facts about the sandbox that programs inside may read from files (E2B).
_MARKER_DIRECTORY = "/run/e2b"
_MARKERS = ("E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID")
# Parts of E2B's message that need what envd does not have; a caller must not believe they worked.
_UNSUPPORTED = ("volumeMounts", "caBundle")
# Below this the clock is left alone: callers send whole seconds, and the message took its time.
_CLOCK_TOLERANCE_NS = 1_500_000_000

SetClock = Callable[[int], None]


def set_clock(unix_ns: int) -> None:
    """Set the wall clock of the whole guest; a container may lack the right to (CAP_SYS_TIME)."""
    if abs(time.time_ns() - unix_ns) > _CLOCK_TOLERANCE_NS:
        with suppress(PermissionError):
            time.clock_settime_ns(time.CLOCK_REALTIME, unix_ns)


def initialise_reader(exchange: Exchange, settings: Settings, clock: SetClock) -> WholeBody:
    return WholeBody(_MAX_BODY_BYTES, lambda body: _initialise(exchange, settings, clock, body))


def _initialise(exchange: Exchange, settings: Settings, clock: SetClock, body: bytes) -> None:
    message = parse_message(body)
    token = message.optional_text("accessToken")
    given = exchange.request.headers.get("x-access-token")
    if not settings.may_initialise(given, token):
        raise HttpError(401, "this sandbox is initialised: show its present access token")
    for name in _UNSUPPORTED:
        if message.has(name):
            raise CallerError(f"field {name} of /init is not supported")
    timestamp = message.optional_text("timestamp")
    unix_ns = None if not timestamp else _unix_ns(timestamp)
    settings.initialise(
        access_token=token,
        environment=_environment(message, settings.global_environment),
        default_user=message.optional_text("defaultUser"),
        default_workdir=message.optional_text("defaultWorkdir"),
    )
    if unix_ns is not None:
        clock(unix_ns)
    _write_markers(settings)
    exchange.reply(204, [("Cache-Control", "no-store")])


def _environment(message: Fields, present: Mapping[str, str]) -> dict[str, str] | None:
    """The global environment as the message wants it; None: it says nothing about it."""
    events = message.optional_text("hyperloopIP")
    if not message.has("envVars") and not events:
        return None
    environment = message.text_map("envVars") if message.has("envVars") else dict(present)
    for name in environment:
        if not name or "=" in name:
            raise CallerError(f"{name!r} is no name of an environment variable")
    if events:
        try:
            socket.inet_pton(socket.AF_INET, events)
        except OSError:
            raise CallerError(f"hyperloopIP {events!r} is no IPv4 address") from None
        environment["E2B_EVENTS_ADDRESS"] = f"http://{events}"
    return environment


def _unix_ns(timestamp: str) -> int:
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        raise CallerError(f"timestamp {timestamp!r} is no RFC 3339 time") from None
    if moment.tzinfo is None:
        raise CallerError(f"timestamp {timestamp!r} names no time zone")
    return round(moment.timestamp() * 1_000_000) * 1000


def _write_markers(settings: Settings) -> None:
    """The files are a courtesy: a read-only root must not fail the sandbox."""
    with suppress(OSError):
        os.makedirs(_MARKER_DIRECTORY, exist_ok=True)
        for name in _MARKERS:
            value = settings.global_environment.get(name)
            if value is None:
                continue
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(f"{_MARKER_DIRECTORY}/.{name}", flags, 0o644)
            try:
                os.write(descriptor, value.encode("utf-8"))
            finally:
                os.close(descriptor)
