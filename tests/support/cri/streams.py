"""The streams of exec, attach and port-forward over a WebSocket.

Every message begins with the number of its channel (v4.channel.k8s.io; k8s.io/kubelet
pkg/cri/streaming/remotecommand/websocket.go and portforward/websocket.go). At its end an exec says
on the error channel, as JSON, how it went.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

PROTOCOL = Subprotocol("v4.channel.k8s.io")
STDIN, STDOUT, STDERR, ERROR, RESIZE = range(5)
# A port has two channels, and both begin with the port as two bytes, little-endian.
PORT_DATA, PORT_ERROR = 0, 1
OPEN_S = 60.0
MESSAGE_S = 60.0
# The protocol has no end of one direction: a silent server has said all.
_MOST_BYTES = 1 << 24


class Streams:
    """One exec or attach. `output` holds what has arrived, by channel."""

    def __init__(self, url: str) -> None:
        self._stack = ExitStack()
        self._socket = self._stack.enter_context(_open(url))
        self.output: dict[int, bytes] = {STDOUT: b"", STDERR: b"", ERROR: b""}

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self._socket.send(bytes([STDIN]) + data)

    def resize(self, columns: int, rows: int) -> None:
        size = json.dumps({"Width": columns, "Height": rows}).encode()
        self._socket.send(bytes([RESIZE]) + size)

    def wait_for(self, channel: int, text: bytes) -> None:
        """Reads until `text` has arrived on the channel."""
        while text not in self.output[channel]:
            assert self._read(), f"the stream ended with {self.output} and without {text!r}"

    def to_end(self) -> int:
        """Reads to the end; the exit status that the error channel tells."""
        while self._read():
            pass
        status: dict[str, Any] = json.loads(self.output[ERROR])
        if status["status"] == "Success":
            return 0
        for cause in status.get("details", {}).get("causes", []):
            if cause["reason"] == "ExitCode":
                return int(cause["message"])
        raise AssertionError(f"no exit status in {status}")

    def close(self) -> None:
        """Detaches."""
        self._stack.close()

    def _read(self) -> bool:
        message = _receive(self._socket)
        if message is None:
            return False
        self.output[message[0]] += message[1:]
        return True


def forward(url: str, port: int, data: bytes) -> bytes:
    """Sends `data` to the forwarded port and returns all it answers."""
    separator = "&" if "?" in url else "?"
    received = {PORT_DATA: b"", PORT_ERROR: b""}
    with _open(f"{url}{separator}port={port}") as socket:
        socket.send(bytes([PORT_DATA]) + data)
        while (message := _receive(socket)) is not None:
            received[message[0]] += message[1:]
    for channel, text in received.items():
        assert text[:2] == port.to_bytes(2, "little"), (channel, text)
    assert not received[PORT_ERROR][2:], received[PORT_ERROR][2:]
    return received[PORT_DATA][2:]


def _open(url: str) -> AbstractContextManager[ClientConnection]:
    return connect(
        url,
        subprotocols=[PROTOCOL],
        compression=None,
        proxy=None,
        open_timeout=OPEN_S,
        max_size=_MOST_BYTES,
    )


def _receive(socket: ClientConnection) -> bytes | None:
    """The next message that holds something, or None at the end."""
    while True:
        try:
            message = socket.recv(MESSAGE_S)
        except ConnectionClosed:
            return None
        data = message if isinstance(message, bytes) else message.encode()
        if len(data) > 1:
            return data
