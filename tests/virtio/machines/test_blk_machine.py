"""The disk against an array of bytes: every request, well made and not."""

from __future__ import annotations

import os
import struct

from device_machine import SENTINEL, DeviceMachine
from guest_driver import BUFFERS_GPA, RAM_BYTES, Buffer
from step_machine import Choices, machine_test, step

from vmcell_runtime.virtio import blk
from vmcell_runtime.virtio.blk import Blk
from vmcell_runtime.virtio.device import VirtioDevice

SECTOR = 512
SECTORS = 12
IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
FAR = (SECTORS, SECTORS + 1, 1 << 40, 2**55, 2**64 - 1)


def _can_zero() -> bool:
    """If this kernel's tmpfs, where the disk is, can zero a range without a hole (6.18: no)."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    os.truncate(fd, SECTOR)
    mode = blk.FALLOC_FL_ZERO_RANGE | blk.FALLOC_FL_KEEP_SIZE
    failed = blk._libc.fallocate(fd, mode, 0, SECTOR)
    os.close(fd)
    return not failed


CAN_ZERO = _can_zero()


class BlkMachine(DeviceMachine):
    """Requests are served in order; what they answer and what the disk holds is the model's.

    A read-only disk refuses every change. Some file systems cannot zero a range: S_UNSUPP is right
    there, and nothing has changed.
    """

    queue_sizes = (8, 16)

    def make(self, choices: Choices) -> VirtioDevice:
        self.model = bytearray(b"".join(bytes([n + 1]) * SECTOR for n in range(SECTORS)))
        writable = os.memfd_create("disk", os.MFD_CLOEXEC)
        self.fds.append(writable)
        os.pwrite(writable, self.model, 0)
        self.disk = writable
        self.read_only = choices.flag(4)
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        fd = os.open(f"/proc/self/fd/{writable}", flags | os.O_CLOEXEC)
        return Blk(self.memory, fd, read_only=self.read_only, serial="serial")

    def forget(self) -> None:
        # What was announced and not served: the driver lost it, and must not expect it.
        self.offered: list[tuple[Buffer, int, bytes]] = []

    def start(self, choices: Choices) -> None:
        if getattr(self, "driver", None) is not None:
            # A request may be served or dropped by a reset; none was begun in between.
            self.model[:] = os.pread(self.disk, len(self.model), 0)
        super().start(choices)

    @step(8)
    def ask(self, choices: Choices) -> None:
        queue = self.driver.queues[0]
        if len(queue.free) < 8:
            return
        kind = choices.of([IN, IN, OUT, OUT, FLUSH, GET_ID, DISCARD, ZEROES, 5, 99])
        sector = choices.below(SECTORS) if not choices.flag(8) else choices.of(FAR)
        data, room = b"", 0
        if kind == IN:
            room = SECTOR * (1 + choices.below(3)) + (choices.below(7) if choices.flag(16) else 0)
        elif kind == OUT:
            data = bytes([choices.below(256)]) * SECTOR * (1 + choices.below(3))
            data += b"odd" * choices.flag(16)
        elif kind == GET_ID:
            room = 20 + choices.below(4)
        elif kind in (DISCARD, ZEROES):
            count = choices.below(4) if not choices.flag(8) else choices.of([1 << 22, 2**32 - 1])
            data = struct.pack("<QII", sector, count, choices.of([0, 0, 0, 1, 2]))
            data += bytes(16) * choices.flag(16)
        header = struct.pack("<IIQ", kind, choices.below(4), sector)
        status, content = self._model(kind, sector, data, room)
        self._offer(header + data, room, choices, status, content)

    def _offer(
        self, request: bytes, room: int, choices: Choices, status: int, content: bytes
    ) -> None:
        queue = self.driver.queues[0]
        place = BUFFERS_GPA + 0x2000 * queue.free[0]
        queue.next_buffer_gpa = place
        readable = [queue.place(piece) for piece in self.cut(request, choices)]
        span = self.room(queue, room + 1, place + 0x1001)
        first = choices.below(room + 1)  # the status may stand anywhere behind the data
        gpa = span[0]
        pieces = [(gpa, first), (gpa + first, room + 1 - first)] if first else [span]
        indirect = self.indirect and choices.flag()
        buffer = queue.offer_spans(readable, pieces, indirect=indirect)
        self.offered.append((buffer, status, content))

    def _model(self, kind: int, sector: int, data: bytes, room: int) -> tuple[int, bytes]:
        """(status, what the driver reads), and the disk as it is afterwards."""
        offset = sector * SECTOR
        if kind == IN:
            inside = room % SECTOR == 0 and offset + room <= len(self.model)
            return (OK, bytes(self.model[offset : offset + room])) if inside else (IOERR, b"")
        if kind == OUT:
            inside = len(data) % SECTOR == 0 and offset + len(data) <= len(self.model)
            if self.read_only or not inside:
                return IOERR, b""
            self.model[offset : offset + len(data)] = data
            return OK, b""
        if kind == FLUSH:
            return OK, b""
        if kind == GET_ID:
            return OK, b"serial".ljust(20, b"\0")
        if kind in (DISCARD, ZEROES) and not self.read_only:
            return self._range(kind, data), b""
        return UNSUPP, b""

    def _range(self, kind: int, data: bytes) -> int:
        sector, count, flags = struct.unpack_from("<QII", data)
        if len(data) > 16 or not 0 < count <= 1 << 22:
            return IOERR
        if sector + count > SECTORS or flags & (3 if kind == DISCARD else 2):
            return IOERR
        if kind == ZEROES and not flags & UNMAP and not CAN_ZERO:
            return UNSUPP
        self.model[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        return OK

    @step(5)
    def work(self, choices: Choices) -> None:
        self.kick(0)
        done = self.driver.queues[0].collect()
        assert [buffer for buffer, _ in done] == [buffer for buffer, _, _ in self.offered]
        for (buffer, written), (_, status, content) in zip(done, self.offered, strict=True):
            gpa = buffer.writable[0][0]
            length = sum(n for _, n in buffer.writable)
            whole = self.check_room((gpa, length))
            assert whole[-1] == status
            assert written == (len(content) + 1 if status == OK else length)
            if status == OK:
                assert whole[: len(content)] == content
                assert not whole[len(content) : -1].strip(bytes([SENTINEL]))
        self.offered = []

    @step()
    def ask_without_status(self, choices: Choices) -> None:
        if not self.offered:
            self.driver.queues[0].offer([struct.pack("<IIQ", OUT, 0, 0), bytes(SECTOR)])
            self.breaks(0, "no room for its status", choices)

    @step()
    def ask_with_half_a_header(self, choices: Choices) -> None:
        if not self.offered:
            self.driver.queues[0].offer([bytes(1 + choices.below(15))], [SECTOR, 1])
            self.breaks(0, "shorter than the 16", choices)

    @step()
    def ask_outside_ram(self, choices: Choices) -> None:
        if not self.offered:
            queue = self.driver.queues[0]
            header = queue.place(struct.pack("<IIQ", IN, 0, 0))
            gpa = choices.of([RAM_BYTES - SECTOR // 2, RAM_BYTES, 2**64 - SECTOR])
            queue.offer_spans([header], [(gpa, SECTOR), queue.room(1)])
            self.breaks(0, "not inside one RAM slot", choices)

    def check(self) -> None:
        super().check()
        if not self.offered:
            assert os.pread(self.disk, len(self.model) + 1, 0) == bytes(self.model)


test_blk = machine_test(BlkMachine, "blk")
