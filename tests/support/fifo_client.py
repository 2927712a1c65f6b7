"""A client's ends of containerd's FIFOs, each moved by a thread of its own."""

from __future__ import annotations

import threading

from shim_harness import DEADLINE_S


class Reader:
    """A client's end of an output FIFO: reads to the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.data = bytearray()
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with open(self._path, "rb", buffering=0) as file:
            while chunk := file.read(1 << 16):
                with self._arrived:
                    self.data += chunk
                    self._arrived.notify_all()

    def wait_for(self, text: bytes) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: text in self.data, DEADLINE_S), bytes(self.data)

    def to_end(self) -> bytes:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the stream has not ended"
        return bytes(self.data)


def feed(path: str, data: bytes) -> threading.Thread:
    """A client's end of stdin: the whole of `data`, then its end."""

    def run() -> None:
        with open(path, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
