"""One event of a process as its listeners get it: made once, framed once for each codec."""

from __future__ import annotations

from binascii import b2a_base64

from vmcell_protos.envd_process import StartResponse

from .wire.codec import JSON, Codec, Values
from .wire.envelope import encode_envelope


class ProcessEvent:
    """`values` is a ProcessEvent message; Start's and Connect's answers have the same shape."""

    __slots__ = ("_frames", "_values")

    def __init__(self, values: Values) -> None:
        self._values = values
        self._frames: dict[str, bytes] = {}

    def frame(self, codec: Codec) -> bytes:
        """A Connect envelope, equal for all listeners of one codec."""
        frame = self._frames.get(codec.name)
        if frame is None:
            frame = self._frames[codec.name] = encode_envelope(self._written(codec))
        return frame

    def _written(self, codec: Codec) -> bytes:
        return codec.dump(StartResponse, {"event": self._values})


class OutputEvent(ProcessEvent):
    """A piece of output; `kind` is "stdout", "stderr" or "pty"."""

    __slots__ = ("_data", "_kind")

    def __init__(self, kind: str, data: bytes) -> None:
        super().__init__({"data": {kind: data}})
        self._kind = kind
        self._data = data

    def _written(self, codec: Codec) -> bytes:
        if codec is not JSON:
            return super()._written(codec)
        # json looks at each character of the base64 for one to escape: nine times slower.
        text = b2a_base64(self._data, newline=False)
        return b'{"event":{"data":{"%b":"%b"}}}' % (self._kind.encode("ascii"), text)
