"""The disk: every request type against a real file, and what a guest can get wrong."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_memory import FlippingMemory
from guest_driver import RAM_BYTES, Buffer, GuestDriver, Plug

from vmcell_protos.errors import CallerError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.blk import Blk

DISK_BYTES = 1 << 20
SECTORS = DISK_BYTES // 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2

MakeDisk = Callable[..., Blk]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(7).randbytes(DISK_BYTES))
    return path


def _open(memory: GuestMemory, image: Path, *, read_only: bool = False) -> Blk:
    fd = os.open(image, os.O_RDONLY if read_only else os.O_RDWR)
    return Blk(memory, fd, read_only=read_only, serial="vmcell0")


@pytest.fixture
def disk(memory: GuestMemory, image: Path, plug: Plug) -> GuestDriver:
    driver = plug(_open(memory, image))
    driver.start()
    return driver


def _header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def _request(
    driver: GuestDriver,
    kind: int,
    sector: int = 0,
    data: list[bytes] | None = None,
    room: list[int] | None = None,
    *,
    indirect: bool = False,
) -> tuple[int, bytes, int]:
    """One request, carried out; (status, what was read, bytes the device says it wrote)."""
    queue = driver.queues[0]
    queue.next_buffer_gpa = queue.buffers_gpa
    queue.offer([_header(kind, sector), *(data or [])], [*(room or []), 1], indirect=indirect)
    driver.kick(0)
    [(buffer, written)] = queue.collect()
    contents = queue.contents(buffer)
    return contents[-1], contents[:-1], written


@pytest.mark.parametrize("indirect", [False, True])
def test_reads_what_stands_in_the_file(disk: GuestDriver, image: Path, indirect: bool) -> None:
    status, data, written = _request(disk, IN, 3, room=[512, 1024], indirect=indirect)
    assert status == OK
    assert written == 1537
    assert data == image.read_bytes()[1536:3072]


@pytest.mark.parametrize("indirect", [False, True])
def test_writes_and_flushes(disk: GuestDriver, image: Path, indirect: bool) -> None:
    status, _, written = _request(
        disk, OUT, SECTORS - 2, data=[b"a" * 512, b"b" * 512], indirect=indirect
    )
    assert (status, written) == (OK, 1)
    assert _request(disk, FLUSH)[0] == OK
    assert image.read_bytes()[-1024:] == b"a" * 512 + b"b" * 512
    assert len(image.read_bytes()) == DISK_BYTES


def test_header_and_status_may_lie_in_any_pieces(disk: GuestDriver, image: Path) -> None:
    queue = disk.queues[0]
    header = _header(IN, 1)
    queue.offer([header[:3], header[3:4], header[4:]], [100, 412, 1])
    queue.offer([header], [513])
    disk.kick(0)
    for buffer, written in queue.collect():
        assert written == 513
        assert queue.contents(buffer) == image.read_bytes()[512:1024] + b"\0"


def test_largest_request_the_limits_allow(disk: GuestDriver, image: Path) -> None:
    size_max, seg_max = disk.get(0x108), disk.get(0x10C)
    assert size_max * seg_max <= 4 << 20
    pieces = DISK_BYTES // size_max
    assert pieces <= seg_max
    status, data, _ = _request(disk, IN, room=[size_max] * pieces)
    assert status == OK
    assert data == image.read_bytes()


@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (2**64 - 1, 512),
        (2**55, 512),
        (0, 511),
        (0, 513),
    ],
)
@pytest.mark.parametrize("kind", [IN, OUT])
def test_outside_the_disk_is_an_io_error(
    disk: GuestDriver, image: Path, kind: int, sector: int, length: int
) -> None:
    before = image.read_bytes()
    data, room = ([], [length]) if kind == IN else ([b"x" * length], [])
    assert _request(disk, kind, sector, data, room)[0] == IOERR
    assert image.read_bytes() == before
    assert not disk.needs_reset


def test_read_only_is_enforced_by_feature_request_and_descriptor(
    memory: GuestMemory, image: Path, plug: Plug
) -> None:
    driver = plug(_open(memory, image, read_only=True))
    driver.start()
    assert driver.offered() & 1 << 5
    assert not driver.offered() & (1 << 13 | 1 << 14)
    before = image.read_bytes()
    assert _request(driver, OUT, 0, [b"x" * 512])[0] == IOERR
    assert _request(driver, DISCARD, 0, [struct.pack("<QII", 0, 8, 0)])[0] == UNSUPP
    assert image.read_bytes() == before
    assert _request(driver, IN, 0, room=[512])[:2] == (OK, before[:512])


@pytest.mark.parametrize(("read_only", "flags"), [(True, os.O_RDWR), (False, os.O_RDONLY)])
def test_descriptor_must_be_opened_as_the_disk_is_used(
    memory: GuestMemory, image: Path, read_only: bool, flags: int
) -> None:
    fd = os.open(image, flags)
    try:
        with pytest.raises(CallerError, match="O_RD"):
            Blk(memory, fd, read_only=read_only, serial="")
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, 511, 513])
def test_image_must_be_whole_sectors(memory: GuestMemory, tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(CallerError, match="multiple of 512"):
            Blk(memory, fd, read_only=False, serial="")
    finally:
        os.close(fd)


def test_serial(disk: GuestDriver) -> None:
    status, data, written = _request(disk, GET_ID, room=[20])
    assert (status, data, written) == (OK, b"vmcell0".ljust(20, b"\0"), 21)


def test_discard_punches_a_hole(disk: GuestDriver, image: Path) -> None:
    image_blocks = image.stat().st_blocks
    assert _request(disk, DISCARD, 0, [struct.pack("<QII", 8, 512, 0)])[0] == OK
    contents = image.read_bytes()
    assert contents[8 * 512 : 520 * 512] == bytes(512 * 512)
    assert len(contents) == DISK_BYTES
    assert image.stat().st_blocks < image_blocks


@pytest.mark.parametrize("flags", [0, 1])
def test_write_zeroes(disk: GuestDriver, image: Path, flags: int) -> None:
    before = image.read_bytes()
    status = _request(disk, WRITE_ZEROES, 0, [struct.pack("<QII", 1, 3, flags)])[0]
    if status == UNSUPP and not flags:
        return  # this file system cannot zero a range; a driver then writes the zeroes
    assert status == OK
    assert image.read_bytes() == before[:512] + bytes(1536) + before[2048:]


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("<QII", SECTORS, 1, 0),
        struct.pack("<QII", SECTORS - 1, 2, 0),
        struct.pack("<QII", 2**64 - 1, 1, 0),
        struct.pack("<QII", 0, 0xFFFF_FFFF, 0),
        struct.pack("<QII", 0, 0, 0),
        struct.pack("<QII", 0, 1, 2),
        struct.pack("<QII", 0, 1, 0) * 2,
    ],
)
def test_bad_ranges_are_io_errors(
    disk: GuestDriver, image: Path, kind: int, payload: bytes
) -> None:
    before = image.read_bytes()
    assert _request(disk, kind, 0, [payload])[0] == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 0x8000_0000, 0xFFFF_FFFF])
def test_other_requests_are_unsupported(disk: GuestDriver, kind: int) -> None:
    assert _request(disk, kind, room=[512])[0] == UNSUPP


@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([_header(IN)[:15]], [512, 1]),
        ([_header(OUT), bytes(512)], []),
        ([], [512, 1]),
        ([_header(GET_ID)], [19, 1]),
        ([_header(DISCARD), bytes(15)], [1]),
    ],
)
def test_malformed_chains_stop_the_device(
    disk: GuestDriver, readable: list[bytes], writable: list[int]
) -> None:
    disk.queues[0].offer(readable, writable)
    disk.kick(0)
    assert disk.needs_reset
    assert not disk.queues[0].collect()


def test_data_outside_ram_stops_the_device(disk: GuestDriver, image: Path) -> None:
    queue = disk.queues[0]
    before = image.read_bytes()
    header = queue.place(_header(OUT))
    queue.offer_spans([header, (RAM_BYTES - 256, 512)], [queue.room(1)])
    disk.kick(0)
    assert disk.needs_reset
    assert image.read_bytes() == before


def test_host_io_error_reaches_the_guest_as_one(
    memory: GuestMemory, tmp_path: Path, plug: Plug
) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(bytes(8192))
    driver = plug(_open(memory, path))
    driver.start()
    os.truncate(path, 4096)
    assert _request(driver, IN, 8, room=[512])[0] == IOERR
    assert _request(driver, IN, 0, room=[512])[0] == OK


def test_full_queue_of_requests_is_served_in_turns(disk: GuestDriver, image: Path) -> None:
    queue = disk.queues[0]
    for sector in range(80):
        queue.offer([_header(IN, sector)], [512, 1])
    disk.set(0x50, 0)
    disk.loop.turn()
    first = queue.collect()
    assert len(first) == 64
    disk.loop.settle()
    done = first + queue.collect()
    contents = image.read_bytes()
    assert len(done) == 80
    for sector, (buffer, _) in enumerate(done):
        expected = contents[512 * sector : 512 * sector + 512] + b"\0"
        assert queue.contents(buffer) == expected


def test_reset_between_notification_and_work_drops_it(disk: GuestDriver, image: Path) -> None:
    before = image.read_bytes()
    disk.queues[0].offer([_header(OUT), b"x" * 512], [1])
    disk.set(0x50, 0)
    disk.set(0x70, 0)
    disk.loop.settle()
    assert image.read_bytes() == before
    assert disk.queues[0].collect() == []


def test_nothing_is_read_twice(flipping_memory: FlippingMemory, image: Path, plug: Plug) -> None:
    driver = plug(_open(flipping_memory, image), ram=flipping_memory)
    driver.start()
    flipping_memory.flip = True
    queue = driver.queues[0]
    offered: list[Buffer] = [
        queue.offer([_header(IN, 2)], [512, 1], indirect=True),
        queue.offer([_header(OUT, 3), b"y" * 512], [1]),
        queue.offer([_header(GET_ID)], [20, 1]),
        queue.offer([_header(WRITE_ZEROES), struct.pack("<QII", 5, 1, 1)], [1]),
    ]
    before = image.read_bytes()
    driver.kick(0)
    assert flipping_memory.second_reads == 0
    flipping_memory.flip = False
    assert [buffer.head for buffer, _ in queue.collect()] == [b.head for b in offered]
    assert queue.contents(offered[0]) == before[1024:1536] + b"\0"
    after = image.read_bytes()
    assert after[1536:2048] == b"y" * 512
    assert after[2560:3072] == bytes(512)
