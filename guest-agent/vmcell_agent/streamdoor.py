"""Hands each of the host's stream connections to who expects its id: 8 bytes little-endian, first.

An id that nobody expects is closed.
"""

from __future__ import annotations

import socket

from vmcell_agent.door import Door

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.eventloop import Loop

HEADER_BYTES = 8


class StreamDoor:
    """Owns the listener; a connection belongs to the callback that expected it."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        accepts_peer: Callable[[object], bool],
    ) -> None:
        """`accepts_peer` judges the peer's address (vsock: the host only)."""
        self._expected: dict[int, Callable[[socket.socket], None]] = {}
        self._door = Door(loop, listener, accepts_peer, HEADER_BYTES, self._on_named)

    def expect(self, stream_id: int, dialled: Callable[[socket.socket], None]) -> bool:
        """Call `dialled` once with the connection of that id; False when the id is taken."""
        if stream_id in self._expected:
            return False
        self._expected[stream_id] = dialled
        return True

    def forget(self, stream_id: int) -> None:
        """Expect that id no longer; nothing happens when it is not expected."""
        self._expected.pop(stream_id, None)

    def forget_host(self) -> None:
        """Close the connections of a host that is gone and that nobody has taken yet."""
        self._door.drop_unnamed()

    def close(self) -> None:
        """Close the listener and every unnamed connection; idempotent."""
        self._door.close()

    def _on_named(self, connection: socket.socket, header: bytes) -> None:
        dialled = self._expected.pop(int.from_bytes(header, "little"), None)
        if dialled is None:
            connection.close()
        else:
            dialled(connection)
