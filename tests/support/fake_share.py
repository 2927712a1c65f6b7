"""What `vmcell_shim.share.Share` offers, without a daemon: numbers, and a socket nobody serves."""

from __future__ import annotations

import socket
from collections.abc import Callable

from vmcell_shim.living import Living


class FakeShare:
    """Counts what is shared in `sources`."""

    def __init__(self, state_directory: str, on_end: Callable[[str], None]) -> None:
        self._connection, self._other = socket.socketpair()
        self.helpers: list[Living] = []
        self.sources: dict[int, tuple[str, bool]] = {}
        self._next_number = 0

    def take_connection(self) -> socket.socket:
        return self._connection

    def add(
        self, source: str, *, read_only: bool, recursive: bool = True, follow: bool = False
    ) -> int:
        number = self._next_number
        self._next_number += 1
        self.sources[number] = (source, read_only)
        return number

    def remove(self, number: int) -> None:
        del self.sources[number]

    def close(self) -> None:
        self._connection.close()
        self._other.close()
