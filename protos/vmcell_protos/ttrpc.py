"""ttrpc without I/O: frames in and out of bytes, calls in, answers out.

What this is for: the shim answers containerd, the guest agent answers the shim, the shim publishes
events; all unary. What it does not do: streaming calls (a server skips Data frames), sockets,
threads. A client takes one answer to each call and nothing else: a peer that says more has lost
count or is hostile, and reading on would cost without end.
Source: containerd/ttrpc PROTOCOL.md (1.2): a 10-byte header (data length, stream id, type, flags,
big-endian), data of at most 4 MiB; client stream ids are odd and rising.
"""

from __future__ import annotations

from struct import Struct

from vmcell_protos.errors import CODE_NAMES, CODES, CallerError, VmcellError
from vmcell_protos.ttrpc_messages import Request, Response, Status
from vmcell_protos.wire import MAX_ITEMS, WireError

MAX_DATA_BYTES = 4 << 20
MAX_UNANSWERED = 4096
"""Calls that one client may have open, those that it has given up waiting for too."""

REQUEST, RESPONSE, DATA = 1, 2, 3
_HEADER = Struct(">IIBB")


class ProtocolError(CallerError):
    """The peer broke the framing; the connection cannot go on and is to be closed."""


class Frame:
    """One frame; `data` is None when the peer announced more than the reader takes (drained)."""

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


def encode_frame(stream_id: int, kind: int, data: bytes) -> bytes:
    """One whole frame; raises CallerError(resource_exhausted) over MAX_DATA_BYTES."""
    if len(data) > MAX_DATA_BYTES:
        raise CallerError(
            f"message of {len(data)} bytes; ttrpc carries at most {MAX_DATA_BYTES}",
            code="resource_exhausted",
        )
    return _HEADER.pack(len(data), stream_id, kind, 0) + data


class FrameReader:
    """Bytes in any portions → frames. Holds at most one frame's data, of `max_data_bytes`."""

    __slots__ = ("_buffer", "_max_data_bytes", "_skip_bytes")

    def __init__(self, max_data_bytes: int = MAX_DATA_BYTES) -> None:
        self._max_data_bytes = max_data_bytes
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
            if length > self._max_data_bytes:
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
    """The client's half of one connection. Of an answer it takes at most `max_data_bytes`, and in
    it `max_items` items (see `wire`)."""

    __slots__ = ("_max_data_bytes", "_max_items", "_next_stream_id", "_reader", "_unanswered")

    def __init__(self, *, max_data_bytes: int = MAX_DATA_BYTES, max_items: int = MAX_ITEMS) -> None:
        self._max_data_bytes = max_data_bytes
        self._max_items = max_items
        self._reader = FrameReader(max_data_bytes)
        self._next_stream_id = 1
        self._unanswered: set[int] = set()

    def call(
        self, service: str, method: str, payload: bytes, timeout_ns: int = 0
    ) -> tuple[int, bytes]:
        """The new call's stream id and the bytes to send. timeout_ns 0: none.

        Raises CallerError(resource_exhausted): the request is too long, or too many are open.
        """
        if len(self._unanswered) >= MAX_UNANSWERED:
            raise CallerError(
                f"{method} is not asked: {MAX_UNANSWERED} calls before it have no answer",
                code="resource_exhausted",
            )
        stream_id = self._next_stream_id
        request = Request(service=service, method=method, payload=payload, timeout_nano=timeout_ns)
        frame = encode_frame(stream_id, REQUEST, request.encode())
        self._next_stream_id += 2
        self._unanswered.add(stream_id)
        return stream_id, frame

    def receive(self, data: bytes) -> list[Reply]:
        """Replies completed by `data`; a reply that cannot be read carries an error itself.

        Raises ProtocolError for what answers no open call.
        """
        replies: list[Reply] = []
        for frame in self._reader.feed(data):
            if frame.kind != RESPONSE or frame.stream_id not in self._unanswered:
                raise ProtocolError(
                    f"frame of kind {frame.kind} on stream {frame.stream_id}; no call there waits "
                    "for an answer"
                )
            self._unanswered.remove(frame.stream_id)
            replies.append(self._reply(frame))
        return replies

    def _reply(self, frame: Frame) -> Reply:
        if frame.data is None:
            text = f"answer is larger than {self._max_data_bytes} bytes"
            return Reply(frame.stream_id, b"", VmcellError(text, code="resource_exhausted"))
        try:
            response = Response.decode(frame.data, self._max_items)
        except WireError as error:
            return Reply(frame.stream_id, b"", VmcellError(f"answer: {error}", code="internal"))
        status = response.status
        if status is not None and status.code:
            code = CODE_NAMES.get(status.code, "unknown")
            return Reply(frame.stream_id, b"", VmcellError(status.message, code=code))
        return Reply(frame.stream_id, response.payload, None)
