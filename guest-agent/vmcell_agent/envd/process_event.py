"""One event of a process as its listeners get it: made once, framed once for each codec."""

from __future__ import annotations

from vmcell_protos.envd_process import StartResponse

from .wire.codec import Codec, Values
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
            frame = encode_envelope(codec.dump(StartResponse, {"event": self._values}))
            self._frames[codec.name] = frame
        return frame
