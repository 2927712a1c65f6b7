"""Block device (virtio 1.2 § 5.2) over a raw file or block device of the host.

Six request types and no more (safety rule V8). A request is one `preadv` or `pwritev` between the
file and guest pages. What a driver gets wrong inside a well-formed request (sectors outside the
disk, writing to a read-only one) is answered IOERR; a malformed chain stops the device.

The format of the file is never looked at: it is sectors.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable

from vmcell_protos.errors import CallerError, GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, spans
from vmcell_runtime.virtio.device import PlainDevice
from vmcell_runtime.virtio.queue import Chain
from vmcell_runtime.virtio.spans import Spans

SECTOR_BYTES = 512
SERIAL_BYTES = 20

# Feature bits, § 5.2.3
F_SIZE_MAX = 1 << 1
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

# Requests and answers, § 5.2.6
T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13
S_OK = 0
S_IOERR = 1
S_UNSUPP = 2
WRITE_ZEROES_UNMAP = 1

SEGMENT_MAX_BYTES = 32 << 10
SEGMENTS_MAX = 126  # with header and status a chain has at most 128 links: half a queue
MAX_DATA_BYTES = 4 << 20
MAX_RANGE_SECTORS = 1 << 22  # 2 GiB at once to discard or zero

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_RANGE = struct.Struct("<QII")  # sector, count, flags
_CONFIG_HEAD = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")

FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


class Blk(PlainDevice):
    """One disk. Owns `fd`; `serial` is shown by GET_ID.

    `fd` is opened O_RDONLY when `read_only`, else O_RDWR, or it is a CallerError.
    """

    device_id = abi.DEVICE_ID_BLOCK
    queue_sizes = (256,)
    max_chain_bytes = MAX_DATA_BYTES + _HEADER.size + 1

    def __init__(self, memory: GuestMemory, fd: int, *, read_only: bool, serial: str) -> None:
        self._memory = memory
        self._fd = fd
        self._read_only = read_only
        self._serial = serial.encode("ascii", "replace")[:SERIAL_BYTES].ljust(SERIAL_BYTES, b"\0")
        try:
            self._length_bytes = os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            raise CallerError(
                f"a disk has no end ({error.strerror}); give a regular file or a block device"
            ) from error
        if not self._length_bytes or self._length_bytes % SECTOR_BYTES:
            raise CallerError(
                f"a disk image has {self._length_bytes} bytes; give a multiple of {SECTOR_BYTES}"
            )
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if access != (os.O_RDONLY if read_only else os.O_RDWR):
            wanted = "O_RDONLY" if read_only else "O_RDWR"
            raise CallerError(f"a disk image was not opened {wanted}; open it so")
        can_punch = not read_only and stat.S_ISREG(os.fstat(fd).st_mode)
        self.features = abi.F_INDIRECT_DESC | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        if read_only:
            self.features |= F_RO
        if can_punch:
            self.features |= F_DISCARD | F_WRITE_ZEROES
        self.config = self._make_config(can_punch)
        self._handlers: dict[int, Callable[[int, Spans, Spans], int]] = {
            T_IN: self._read,
            T_OUT: self._write,
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
        }
        if can_punch:
            self._handlers |= {T_DISCARD: self._discard, T_WRITE_ZEROES: self._write_zeroes}
        self._activation = None

    def process(self, queue_index: int) -> bool:
        activation = self._activation
        if activation is None:
            return False
        queue = activation.queues[queue_index]

        def answer(chain: Chain) -> None:
            queue.complete(chain.head, self._serve(chain))
            # Each request is slow beside this: let the guest have it while we do the next.
            activation.link.signal(queue)

        return queue.drain(answer)

    def close(self) -> None:
        self._activation = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _make_config(self, can_punch: bool) -> bytes:
        sectors = MAX_RANGE_SECTORS if can_punch else 0
        segments = 1 if can_punch else 0
        alignment = 4096 // SECTOR_BYTES if can_punch else 0
        return _CONFIG_HEAD.pack(
            self._length_bytes // SECTOR_BYTES,
            SEGMENT_MAX_BYTES,
            SEGMENTS_MAX,
            *(0, 0, 0),  # geometry
            SECTOR_BYTES,
            *(0, 0, 0, 0),  # topology
            *(0, 0, 1),  # writeback, unused, queues
            *(sectors, segments, alignment),
            *(sectors, segments, 1),  # write zeroes may unmap
        )

    def _serve(self, chain: Chain) -> int:
        """Carries out one request and writes its status; the bytes written into the chain."""
        header, payload = spans.split(chain.readable, _HEADER.size)
        if not chain.writable_bytes:
            raise GuestError("a disk request has no room for its status")
        room, status_span = spans.split(chain.writable, chain.writable_bytes - 1)
        kind, _, sector = _HEADER.unpack(spans.read(self._memory, header))
        handler = self._handlers.get(kind)
        written, status = 0, S_UNSUPP
        if handler is not None:
            try:
                written, status = handler(sector, payload, room), S_OK
            except _RefusedError:
                status = S_IOERR
            except OSError as error:
                # Not every file system can zero a range; a driver told so writes the zeroes.
                status = S_UNSUPP if error.errno == errno.EOPNOTSUPP else S_IOERR
        spans.write(self._memory, status_span, bytes([status]))
        # On an error nothing is promised about the data, and the status is the last byte.
        return written + 1 if status == S_OK else chain.writable_bytes

    def _offset(self, sector: int, length_bytes: int) -> int:
        offset = sector * SECTOR_BYTES
        if length_bytes % SECTOR_BYTES or offset + length_bytes > self._length_bytes:
            raise _RefusedError
        return offset

    def _read(self, sector: int, _payload: Spans, room: Spans) -> int:
        length = sum(span_bytes for _, span_bytes in room)
        self._transfer(self._memory.preadv, self._offset(sector, length), room, length)
        return length

    def _write(self, sector: int, payload: Spans, _room: Spans) -> int:
        if self._read_only:
            raise _RefusedError
        length = sum(span_bytes for _, span_bytes in payload)
        self._transfer(self._memory.pwritev, self._offset(sector, length), payload, length)
        return 0

    def _transfer(
        self, call: Callable[[int, Spans, int], int], offset: int, pieces: Spans, length: int
    ) -> None:
        while length:
            done = call(self._fd, pieces, offset)
            if not done:
                raise _RefusedError  # the file became shorter under us
            offset += done
            length -= done
            if length:
                _, pieces = spans.split(pieces, done)

    def _flush(self, _sector: int, _payload: Spans, _room: Spans) -> int:
        os.fdatasync(self._fd)
        return 0

    def _get_id(self, _sector: int, _payload: Spans, room: Spans) -> int:
        spans.write(self._memory, spans.split(room, SERIAL_BYTES)[0], self._serial)
        return SERIAL_BYTES

    def _discard(self, _sector: int, payload: Spans, _room: Spans) -> int:
        offset, length, flags = self._range(payload)
        if flags:
            raise _RefusedError
        self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        return 0

    def _write_zeroes(self, _sector: int, payload: Spans, _room: Spans) -> int:
        offset, length, flags = self._range(payload)
        if flags & ~WRITE_ZEROES_UNMAP:
            raise _RefusedError
        # Without the flag the device must not deallocate, § 5.2.6.2.
        mode = FALLOC_FL_PUNCH_HOLE if flags & WRITE_ZEROES_UNMAP else FALLOC_FL_ZERO_RANGE
        self._fallocate(mode | FALLOC_FL_KEEP_SIZE, offset, length)
        return 0

    def _range(self, payload: Spans) -> tuple[int, int, int]:
        """(offset, length, flags) of the one range a request may carry, within the disk."""
        head, rest = spans.split(payload, _RANGE.size)
        sector, count, flags = _RANGE.unpack(spans.read(self._memory, head))
        if rest or not 0 < count <= MAX_RANGE_SECTORS:
            raise _RefusedError
        length = count * SECTOR_BYTES
        return self._offset(sector, length), length, flags

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        while _libc.fallocate(self._fd, mode, offset, length):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


class _RefusedError(Exception):
    """A well-formed request that cannot be served; becomes IOERR."""
