"""Plain clients of envd for what the SDK cannot say: raw HTTP and Connect frames, written apart
from envd's own codecs so that both cannot be wrong in the same way."""

from __future__ import annotations

import base64
import http.client
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from envd_harness import DEADLINE_SECONDS, Envd

JSON = {"Content-Type": "application/json", "Connect-Protocol-Version": "1"}
STREAM = {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(
    envd: Envd,
    method: str,
    target: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", envd.port, timeout=DEADLINE_SECONDS)
    try:
        connection.request(method, target, body=body, headers=headers or {})
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(status=response.status, headers=found, body=response.read())
    finally:
        connection.close()


def unary(envd: Envd, method: str, message: Any, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps(message).encode()
    return request(envd, "POST", "/" + method, body, {**JSON, **(headers or {})})


def frame(message: Any, flags: int = 0) -> bytes:
    payload = json.dumps(message).encode()
    return struct.pack(">BI", flags, len(payload)) + payload


class Stream:
    """One server stream: iterate over its events; after that `end` is the end frame's message."""

    def __init__(
        self, envd: Envd, method: str, message: Any, headers: dict[str, str] | None = None
    ) -> None:
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", envd.port, timeout=DEADLINE_SECONDS
        )
        self._connection.request(
            "POST", "/" + method, body=frame(message), headers={**STREAM, **(headers or {})}
        )
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.content_type = self._response.getheader("Content-Type")
        self.end: Any = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._response.read(count - len(data))
            if not piece:
                raise EOFError(f"stream cut after {len(data)} of {count} bytes")
            data += piece
        return data

    def next_event(self) -> Any:
        """The next event, None at the end of the stream."""
        flags, length = struct.unpack(">BI", self._exactly(5))
        message = json.loads(self._exactly(length))
        if flags & 2:
            assert self._response.read() == b""
            self.end = message
            return None
        return message.get("event", message)

    def __iter__(self) -> Iterator[Any]:
        while (event := self.next_event()) is not None:
            yield event

    def started(self) -> int:
        event = self.next_event()
        assert isinstance(event["start"]["pid"], int)
        return int(event["start"]["pid"])

    def output(self, kind: str = "stdout") -> bytes:
        """All of one output until the end event, which is kept as `last`."""
        pieces = []
        for event in self:
            if "data" in event and kind in event["data"]:
                pieces.append(base64.b64decode(event["data"][kind], validate=True))
            if "end" in event:
                self.last = event["end"]
        return b"".join(pieces)


def shell(command: str, **more: Any) -> dict[str, Any]:
    """A Start message for `sh -c command`."""
    process = {"cmd": "/bin/sh", "args": ["-c", command], **more.pop("process", {})}
    return {"process": process, "stdin": False, **more}
