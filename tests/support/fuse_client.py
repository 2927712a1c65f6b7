"""A guest with one virtio-fs device and no kernel: a FUSE client over the device's queues.

As small as a test can use it; numbers of <linux/fuse.h> 7.31.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from guest_driver import RAM_BYTES, Buffer, GuestDriver
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.fs import Fs
from vmcell_runtime.virtio.vhost_user import FrontEnd

HIPRIO, REQUESTS = 0, 1
ROOT = 1
LOOKUP, FORGET, GETATTR, OPEN, READ, WRITE, INIT, READDIR, CREATE = 1, 2, 3, 14, 15, 16, 26, 28, 35
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
REPLY_ROOM_BYTES = 8192
DEADLINE_S = 10.0


class FuseClient:
    """Asks through the request queue of a started driver; replies come from another process.

    An error of the server is raised as OSError.
    """

    def __init__(self, driver: GuestDriver) -> None:
        self.driver = driver
        self.unique = 2

    def send(self, opcode: int, node: int, body: bytes = b"") -> Buffer:
        """Queues one request and notifies; the reply is awaited by `reply`."""
        self.unique += 2
        request = _IN.pack(_IN.size + len(body), opcode, self.unique, node, 0, 0, os.getpid(), 0, 0)
        queue = self.driver.queues[REQUESTS]
        room = queue.room(REPLY_ROOM_BYTES)
        self.driver.memory.write(room[0], bytes(_OUT.size))
        buffer = queue.offer_spans(
            [queue.place(request), *([queue.place(body)] if body else [])],
            [(room[0], _OUT.size), (room[0] + _OUT.size, room[1] - _OUT.size)],
            indirect=True,
        )
        self.driver.kick(REQUESTS)
        return buffer

    def reply(self, buffer: Buffer) -> bytes:
        """The body of the reply to `buffer`, the only request in flight."""
        queue = self.driver.queues[REQUESTS]
        end = time.monotonic() + DEADLINE_S
        while not (done := queue.collect()):
            assert time.monotonic() < end, "the file system does not answer"
            self.driver.loop.settle()
        assert [found.head for found, _ in done] == [buffer.head]
        reply = queue.contents(buffer)
        length, error, unique = _OUT.unpack_from(reply)
        assert unique == self.unique
        assert done[0][1] == length
        if error:
            raise OSError(-error, os.strerror(-error))
        return reply[_OUT.size : length]

    def call(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        return self.reply(self.send(opcode, node, body))

    def init(self) -> tuple[int, int]:
        """The server's protocol version."""
        answer = self.call(INIT, 0, struct.pack("<IIII", 7, 31, 4096, 0))
        major, minor = struct.unpack_from("<II", answer)
        return major, minor

    def lookup(self, node: int, name: str) -> int:
        """The node of `name` below `node`."""
        (found,) = struct.unpack_from("<Q", self.call(LOOKUP, node, name.encode() + b"\0"))
        return int(found)

    def walk(self, path: str) -> int:
        node = ROOT
        for name in path.split("/"):
            node = self.lookup(node, name)
        return node

    def exists(self, node: int, name: str) -> bool:
        try:
            self.lookup(node, name)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def read_file(self, path: str) -> bytes:
        """The first 4096 bytes of a file."""
        node = self.walk(path)
        (handle,) = struct.unpack_from("<Q", self.call(OPEN, node, struct.pack("<II", 0, 0)))
        return self.call(READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))

    def write_file(self, directory: int, name: str, data: bytes) -> None:
        """A new file."""
        body = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0o100644, 0o022, 0)
        answer = self.call(CREATE, directory, body + name.encode() + b"\0")
        (node,) = struct.unpack_from("<Q", answer)
        (handle,) = struct.unpack_from("<Q", answer, 128)  # struct fuse_entry_out comes first
        words = struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, os.O_WRONLY, 0)
        (written,) = struct.unpack_from("<I", self.call(WRITE, node, words + data))
        assert written == len(data)


@contextmanager
def fuse_guest(connection: socket.socket) -> Iterator[FuseClient]:
    """A guest whose device is served at the other end of `connection`, which it takes over.

    `driver.reports` has what the device says; `driver.call_fd` is its interrupt line.
    """
    with ExitStack() as made:
        loop = TurningLoop()
        made.callback(loop.close)
        memory = GuestMemory(RAM_BYTES, shared=True)
        made.callback(memory.close)
        call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        made.callback(os.close, call_fd)
        front_end = FrontEnd(connection)
        made.callback(front_end.close)
        lines: list[str] = []
        device = Fs(memory, loop, front_end, call_fd, tag="vmcell", report=lines.append)
        driver = GuestDriver(device, memory, loop)
        made.callback(driver.close)
        driver.reports = lines
        driver.start()
        yield FuseClient(driver)
