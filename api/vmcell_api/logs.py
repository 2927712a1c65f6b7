"""The logs of the service's processes: one line a record, as text or JSON, without secrets.

What belongs to a request (its id, team, key, sandbox) stands in a context that every record of it
gets. Code logs ids and sentences of ours only. Where others' text could come in, it is kept out or
cut: of an unexpected exception its type and frames are shown, not its words, which may quote a
body; of gunicorn's complaint about a request only that there was one; and whatever looks like a key
or token of ours is struck out of every line.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Mapping

_SECRET = re.compile(r"(e2b_|vmt_)[0-9a-zA-Z]{8,}|\b[0-9a-f]{32,}\b|v1_[A-Za-z0-9+/]{20,}")
_QUOTES_REQUESTS = ("Invalid request from ip=", "Error handling request", "Error handling http")

_request: contextvars.ContextVar[Mapping[str, object] | None] = contextvars.ContextVar(
    "vmcell_request", default=None
)


def begin_request(request_id: str) -> None:
    """Every record of this thread is of that request now."""
    _request.set({"request_id": request_id})


def add_to_request(**fields: object) -> None:
    """More about the request of this thread: ids, no secrets."""
    _request.set({**(_request.get() or {}), **fields})


def end_request() -> None:
    """What follows in this thread is of no request."""
    _request.set(None)


def without_secrets(text: str) -> str:
    """`text` with our keys, tokens and signatures struck out."""
    return _SECRET.sub("[secret]", text)


def frames_of(error: BaseException) -> str:
    """Type and frames of an exception and of its causes, without their words."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 5:
        frames = traceback.extract_tb(current.__traceback__)[-8:]
        places = " < ".join(f"{row.filename}:{row.lineno} {row.name}" for row in reversed(frames))
        parts.append(f"{type(current).__qualname__} at {places or 'no frame'}")
        current = current.__cause__ or current.__context__
    return "; after ".join(parts)


class _Formatter(logging.Formatter):
    """Text: `<process>: <LEVEL> <sentence> [key=value …]`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        details = " ".join(f"{key}={value}" for key, value in _details(record).items())
        line = f"{self._process}: {record.levelname} {_sentence(record)}"
        return _one_line(f"{line} [{details}]" if details else line)


class _JsonFormatter(_Formatter):
    """JSON: `time` (RFC 3339), `level`, `process`, `logger`, `message`, then the details."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": without_secrets(_sentence(record)),
        }
        for key, value in _details(record).items():
            fields[key] = without_secrets(value) if isinstance(value, str) else value
        return json.dumps(fields, ensure_ascii=True, default=str)


def _sentence(record: logging.LogRecord) -> str:
    message = record.getMessage()
    for beginning in _QUOTES_REQUESTS:
        if message.startswith(beginning):
            message = f"{beginning.removesuffix(' from ip=')} (its text is left out)"
    if record.exc_info and record.exc_info[1] is not None:
        message = f"{message}: {frames_of(record.exc_info[1])}"
    return message


def _details(record: logging.LogRecord) -> dict[str, object]:
    return {**(_request.get() or {}), **getattr(record, "details", {})}


def _one_line(text: str) -> str:
    return without_secrets(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r"))


def set_up(process: str, log_format: str) -> None:
    """Makes all records of this process leave by standard error in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process) if log_format == "json" else _Formatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
