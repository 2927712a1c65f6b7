"""Answers of a guest's envd, which may say anything: noded understands them or refuses them."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.node.guest_process import MAX_FRAME_BYTES, Command, CommandRefused, GuestProcesses
from vmcell_protos.errors import GuestError, HostError, VmcellError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(("event", "data", "end", "stdout", "exitCode", "error", "code")), inner
        )
    ),
    max_leaves=6,
)


@contextlib.contextmanager
def _answering(body: bytes, status: int = 200) -> Iterator[GuestProcesses]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + 5))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield GuestProcesses("127.0.0.1", "token", port=server.server_port)
        finally:
            server.shutdown()
            thread.join(10)


def _frame(message: object, flags: int = 0) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def _event(**event: object) -> bytes:
    return _frame({"event": event})


END = _event(end={"exitCode": 0, "exited": True, "status": "exit status 0"}) + _frame({}, 2)


def _run(body: bytes, status: int = 200) -> tuple[int, bytes]:
    output = bytearray()
    with _answering(body, status) as guest:
        code = guest.run(
            Command(text="true"),
            deadline=time.monotonic() + 20,
            on_output=lambda kind, data: output.extend(data),
        )
    return code, bytes(output)


def test_output_and_status() -> None:
    text = base64.b64encode(b"hello\n").decode()
    start = _event(start={"pid": 5})
    assert _run(start + _event(data={"stdout": text}) + END) == (0, b"hello\n")
    ended = _event(end={"exitCode": 3, "exited": True})
    assert _run(start + ended + _frame({}, 2))[0] == 3
    killed = _event(end={"exitCode": 0, "exited": False})
    assert _run(killed)[0] == 255, "a signal is no success"


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        (b"", 200, HostError, "middle of a command"),
        (_event(start={"pid": 5}), 200, HostError, "middle of a command"),
        (_frame({}, 2), 200, GuestError, "without the command's exit status"),
        (_frame(b"not JSON"), 200, GuestError, "not JSON"),
        (_frame([]), 200, GuestError, "no JSON object"),
        (b"\0" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big"), 200, GuestError, "frame of"),
        (_event(data={"stdout": "%%%"}), 200, GuestError, "not base64"),
        (_event(data={"stdout": "\N{SNOWMAN}"}), 200, GuestError, "not base64"),
        (_event(end={"exitCode": "x", "exited": True}), 200, GuestError, "exitCode"),
        (_event(end={"exitCode": True, "exited": True}), 200, GuestError, "exitCode"),
        (_event(end={"exitCode": 1 << 70, "exited": True}), 200, GuestError, "exitCode"),
        (b"no", 500, GuestError, "500: no"),
        (
            _frame({"error": {"code": "unauthenticated", "message": "invalid username: 'x'"}}, 2),
            200,
            CommandRefused,
            "unauthenticated: invalid username: 'x'",
        ),
        (
            _frame({"error": {"code": "deadline_exceeded", "message": "late"}}, 2),
            200,
            HostError,
            "in time",
        ),
        (_frame({"error": {"code": "made up", "message": 5}}, 2), 200, CommandRefused, "made up"),
    ],
)
def test_wrong_answers_say_whose_fault_it_is(
    body: bytes, status: int, kind: type[VmcellError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        _run(body, status)


@given(
    st.lists(JSON.map(_frame) | JSON.map(lambda e: _frame({"event": e})) | st.binary(max_size=9))
)
def test_any_answer_ends_in_a_status_or_an_error_of_ours(frames: list[bytes]) -> None:
    with contextlib.suppress(VmcellError):
        code, _ = _run(b"".join(frames))
        assert isinstance(code, int)


@pytest.mark.parametrize(
    "words",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + (1 << 20).to_bytes(5, "big"),
    ],
)
def test_a_guest_that_goes_on_for_ever_is_given_up_at_the_deadline(words: bytes) -> None:
    """It was listened to for ever: it is never silent, and what it says is well-formed."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def talk() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(words)
            while not over.wait(0.01):
                connection.sendall(words if b"100" in words else b" ")

    thread = threading.Thread(target=talk)
    thread.start()
    guest = GuestProcesses("127.0.0.1", "token", port=listener.getsockname()[1])
    try:
        with pytest.raises(HostError) as caught:
            guest.run(
                Command(text="true"), deadline=time.monotonic() + 0.5, on_output=lambda *_: None
            )
    finally:
        over.set()
        thread.join(20)
        listener.close()
    assert caught.value.code in ("deadline_exceeded", "aborted")


def test_a_layer_that_ends_early_is_no_layer() -> None:
    with (
        _answering(b"x" * 100) as guest,
        pytest.raises(HostError, match="broke off"),
        guest.layer(deadline=time.monotonic() + 20) as pieces,
    ):
        list(pieces)


def test_nobody_listens_and_time_is_over() -> None:
    guest = GuestProcesses("127.0.0.1", "token", port=9)
    with pytest.raises(HostError, match="lost"):
        guest.run(
            Command(text="x"), deadline=time.monotonic() + 5, on_output=lambda kind, data: None
        )
    with pytest.raises(HostError, match="time is over"):
        guest.run(Command(text="x"), deadline=0.0, on_output=lambda kind, data: None)
