"""ttrpc without I/O: frames in and out of bytes, calls in, answers out.

What this is for: the shim answers containerd, the guest agent answers the shim, the shim publishes
events; all unary. What it does not do: streaming calls (a Data frame is skipped), sockets, threads.
Source: containerd/ttrpc PROTOCOL.md (1.2): a 10-byte header (data length, stream id, type, flags,
big-endian), data of at most 4 MiB; client stream ids are odd and rising.
"""

from __future__ import annotations

from struct import Struct

from vmcell_protos.errors import CODE_NAMES, CODES, CallerError, VmcellError
from vmcell_protos.ttrpc_messages import Request, Response, Status
from vmcell_protos.wire import WireError

MAX_DATA_BYTES = 4 << 20
REQUEST, RESPONSE, DATA = 1, 2, 3
_HEADER = Struct(">IIBB")


class ProtocolError(CallerError):
    """The peer broke the framing; the connection cannot go on and is to be closed."""


class Frame:
    """One frame; `data` is None when the peer announced more than MAX_DATA_BYTES (drained)."""

    __slots__ = ("data", "flags", "kind", "stream_id")

    def __init__(self, stream_id: int, kind: int, flags: int, data: bytes | None) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.flags = flags
        self.data = data


class Call:
    """A request that arrived: answer it with `respond` or `fail` and its `stream_id`."""

    __slots__ = ("metadata", "method", "payload", "service", "stream_id", "timeout_ns")

    def __init__(self, stream_id: int, request: Request) -> None:
        self.stream_id = stream_id
        self.service = request.service
        self.method = request.method
        self.payload = request.payload
        self.timeout_ns = request.timeout_nano
        self.metadata = {pair.key: pair.value for pair in request.metadata}


class Reply:
    """An answer that arrived; `error` is None or carries the peer's code and sentence."""

    __slots__ = ("error", "payload", "stream_id")

    def __init__(self, stream_id: int, payload: bytes, error: VmcellError | None) -> None:
        self.stream_id = stream_id
        self.payload = payload
        self.error = error


def encode_frame(stream_id: int, kind: int, data: bytes, flags: int = 0) -> bytes:
    """One whole frame; raises CallerError(resource_exhausted) over MAX_DATA_BYTES."""
    if len(data) > MAX_DATA_BYTES:
        raise CallerError(
            f"message of {len(data)} bytes; ttrpc carries at most {MAX_DATA_BYTES}",
            code="resource_exhausted",
        )
    return _HEADER.pack(len(data), stream_id, kind, flags) + data


class FrameReader:
    """Bytes in any portions → frames. Holds at most one frame's data."""

    __slots__ = ("_buffer", "_skip_bytes")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip_bytes = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames completed by `data`, in order."""
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped
            data = data[skipped:]
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= _HEADER.size:
            length, stream_id, kind, flags = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if length > MAX_DATA_BYTES:
                frames.append(Frame(stream_id, kind, flags, None))
                self._skip_bytes = max(0, end - len(self._buffer))
                del self._buffer[:end]
                continue
            if len(self._buffer) < end:
                break
            frames.append(Frame(stream_id, kind, flags, bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]
        return frames


class ServerConnection:
    """The server's half of one connection. Methods return the bytes to send."""

    __slots__ = ("_last_stream_id", "_reader")

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._last_stream_id = 0

    def receive(self, data: bytes) -> tuple[list[Call], bytes]:
        """Calls completed by `data`, and error answers to send at once (bad or oversize requests).

        Raises ProtocolError when the connection has to be closed.
        """
        calls: list[Call] = []
        answers = bytearray()
        for frame in self._reader.feed(data):
            if frame.kind != REQUEST:
                continue
            if frame.stream_id % 2 == 0 or frame.stream_id <= self._last_stream_id:
                raise ProtocolError(
                    f"stream id {frame.stream_id} after {self._last_stream_id}; "
                    "a client's ids are odd and rise"
                )
            self._last_stream_id = frame.stream_id
            if frame.data is None:
                text = f"request is larger than {MAX_DATA_BYTES} bytes"
                answers += self.fail(frame.stream_id, "resource_exhausted", text)
                continue
            try:
                calls.append(Call(frame.stream_id, Request.decode(frame.data)))
            except WireError as error:
                answers += self.fail(frame.stream_id, "invalid_argument", f"request: {error}")
        return calls, bytes(answers)

    def respond(self, stream_id: int, payload: bytes) -> bytes:
        """The answer's bytes; one over the size limit becomes an error answer."""
        try:
            return encode_frame(stream_id, RESPONSE, Response(payload=payload).encode())
        except CallerError as error:
            return self.fail(stream_id, error.code, str(error))

    def fail(self, stream_id: int, code: str, message: str) -> bytes:
        """An error answer; `code` is a key of CODES, the message is cut at 64 KiB."""
        status = Status(code=CODES[code].ttrpc, message=message[: 64 << 10])
        return encode_frame(stream_id, RESPONSE, Response(status=status).encode())


class ClientConnection:
    """The client's half of one connection."""

    __slots__ = ("_next_stream_id", "_reader")

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._next_stream_id = 1

    def call(
        self, service: str, method: str, payload: bytes, timeout_ns: int = 0
    ) -> tuple[int, bytes]:
        """The new call's stream id and the bytes to send. timeout_ns 0: none."""
        stream_id = self._next_stream_id
        self._next_stream_id += 2
        request = Request(service=service, method=method, payload=payload, timeout_nano=timeout_ns)
        return stream_id, encode_frame(stream_id, REQUEST, request.encode())

    def receive(self, data: bytes) -> list[Reply]:
        """Replies completed by `data`; a reply that cannot be read carries an error itself."""
        replies: list[Reply] = []
        for frame in self._reader.feed(data):
            if frame.kind == RESPONSE:
                replies.append(_reply(frame))
        return replies


def _reply(frame: Frame) -> Reply:
    if frame.data is None:
        text = f"answer is larger than {MAX_DATA_BYTES} bytes"
        return Reply(frame.stream_id, b"", VmcellError(text, code="resource_exhausted"))
    try:
        response = Response.decode(frame.data)
    except WireError as error:
        return Reply(frame.stream_id, b"", VmcellError(f"answer: {error}", code="internal"))
    status = response.status
    if status is not None and status.code:
        code = CODE_NAMES.get(status.code, "unknown")
        return Reply(frame.stream_id, b"", VmcellError(status.message, code=code))
    return Reply(frame.stream_id, response.payload, None)
