"""Guest memory written to a file and laid out from one: what is written, and what comes back."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime import memory as memory_module
from vmcell_runtime.memory import HIGH_RAM_GPA, LOW_RAM_LIMIT_BYTES, GuestMemory
from vmcell_runtime.page_map import PAGE_BYTES

PAGES = 64
SMALL = PAGES * PAGE_BYTES
TWO_SLOTS = LOW_RAM_LIMIT_BYTES + (64 << 20)

MakeFile = Callable[..., int]


@pytest.fixture
def make_file() -> Iterator[MakeFile]:
    with ExitStack() as opened:

        def make(length: int = SMALL, source: int = -1) -> int:
            """A hole, or a copy of another file."""
            fd = os.memfd_create("image")
            opened.callback(os.close, fd)
            os.ftruncate(fd, length)
            if source >= 0:
                os.pwrite(fd, os.pread(source, length, 0), 0)
            return fd

        yield make


@pytest.fixture
def small() -> Iterator[GuestMemory]:
    memory = GuestMemory(SMALL)
    yield memory
    memory.close()


def fill(page: int) -> bytes:
    return bytes([page % 255 + 1]) * PAGE_BYTES


def data_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_zeros_and_untouched_pages_stay_holes(small: GuestMemory, make_file: MakeFile) -> None:
    small.write(3 * PAGE_BYTES, fill(3))
    small.write(7 * PAGE_BYTES, bytes(PAGE_BYTES))  # written, with nothing
    small.read(0, 2 * PAGE_BYTES)  # the kernel's page of zeros stands there now
    fd = make_file()
    assert small.save_pages(fd) == PAGE_BYTES
    assert data_bytes(fd) == PAGE_BYTES
    assert os.pread(fd, PAGE_BYTES, 3 * PAGE_BYTES) == fill(3)


def test_upon_an_image_only_what_changed_is_written(
    small: GuestMemory, make_file: MakeFile
) -> None:
    for page in range(PAGES):
        small.write(page * PAGE_BYTES, fill(page))
    first = make_file()
    assert small.save_pages(first) == SMALL
    small.lay_image(first)
    assert small.read(0, SMALL) == os.pread(first, SMALL, 0)
    second = make_file(source=first)
    assert small.save_pages(second) == 0, "reading makes no page the guest's own"
    small.write(5 * PAGE_BYTES, b"new")
    small.write(9 * PAGE_BYTES, bytes(PAGE_BYTES))  # zeros count where there was something
    assert small.save_pages(second) == 2 * PAGE_BYTES
    assert os.pread(second, SMALL, 0) == small.read(0, SMALL)
    assert os.pread(first, PAGE_BYTES, 5 * PAGE_BYTES) == fill(5), "nobody wrote to the image"


def test_what_is_discarded_is_as_in_the_image(small: GuestMemory, make_file: MakeFile) -> None:
    small.write(0, fill(0) + fill(1))
    image = make_file()
    small.save_pages(image)
    small.lay_image(image)
    small.write(0, b"own now")
    small.write(2 * PAGE_BYTES, fill(2))
    small.discard(0, 3 * PAGE_BYTES)
    assert small.read(0, 3 * PAGE_BYTES) == fill(0) + fill(1) + bytes(PAGE_BYTES)
    copy = make_file(source=image)
    assert small.save_pages(copy) == 0
    assert os.pread(copy, SMALL, 0) == small.read(0, SMALL)


def test_memory_that_begins_as_an_image(make_file: MakeFile) -> None:
    image = make_file()
    os.pwrite(image, fill(1), PAGE_BYTES)
    memory = GuestMemory(SMALL)
    try:
        memory.lay_image(image)
        assert memory.read(PAGE_BYTES, PAGE_BYTES) == fill(1)
        memory.write(PAGE_BYTES, b"other")
        assert os.pread(image, 5, PAGE_BYTES) == fill(1)[:5]
        assert memory.save_pages(make_file(source=image)) == PAGE_BYTES
    finally:
        memory.close()


def test_above_3_gib_both_ranges_stand_in_the_file(make_file: MakeFile) -> None:
    places = (0, LOW_RAM_LIMIT_BYTES - PAGE_BYTES, HIGH_RAM_GPA, HIGH_RAM_GPA + (63 << 20))
    offsets = (0, LOW_RAM_LIMIT_BYTES - PAGE_BYTES, LOW_RAM_LIMIT_BYTES, TWO_SLOTS - (1 << 20))
    memory, image = GuestMemory(TWO_SLOTS), make_file(TWO_SLOTS)
    try:
        for number, gpa in enumerate(places):
            memory.write(gpa, fill(number))
        assert memory.save_pages(image) == len(places) * PAGE_BYTES
    finally:
        memory.close()
    assert [os.pread(image, PAGE_BYTES, at) for at in offsets] == [fill(n) for n in range(4)]
    assert data_bytes(image) == len(places) * PAGE_BYTES
    memory = GuestMemory(TWO_SLOTS)
    try:
        memory.lay_image(image)
        assert [memory.read(gpa, PAGE_BYTES) for gpa in places] == [fill(n) for n in range(4)]
        memory.write(HIGH_RAM_GPA + PAGE_BYTES, fill(9))
        hole = make_file(TWO_SLOTS)
        assert memory.save_pages(hole) == PAGE_BYTES
        assert os.pread(hole, PAGE_BYTES, LOW_RAM_LIMIT_BYTES + PAGE_BYTES) == fill(9)
    finally:
        memory.close()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("write", "zero", "read", "discard", "save")),
            st.integers(0, 7),
            st.integers(1, 4),
        ),
        max_size=20,
    )
)
def test_a_chain_of_saves_is_the_memory(steps: list[tuple[str, int, int]]) -> None:
    memory = GuestMemory(SMALL)
    with ExitStack() as owned:
        owned.callback(memory.close)
        base = -1
        for number, (what, page, count) in enumerate([*steps, ("save", 0, 1)]):
            gpa, length = page * PAGE_BYTES, count * PAGE_BYTES
            match what:
                case "write":
                    memory.write(gpa, bytes([number + 1]) * length)
                case "zero":
                    memory.write(gpa, bytes(length))
                case "read":
                    memory.read(gpa, length)
                case "discard":
                    memory.discard(gpa, length)
                case "save":
                    fd = os.memfd_create("image")
                    owned.callback(os.close, fd)
                    os.ftruncate(fd, SMALL)
                    if base >= 0:
                        os.pwrite(fd, os.pread(base, SMALL, 0), 0)
                    before = memory.read(0, SMALL)
                    memory.save_pages(fd)
                    memory.lay_image(fd)
                    assert os.pread(fd, SMALL, 0) == before == memory.read(0, SMALL)
                    base = fd


def test_a_kernel_that_tells_too_little_is_an_error(
    small: GuestMemory, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write(0, fill(0))
    real = os.pread
    monkeypatch.setattr(
        memory_module.os, "pread", lambda fd, count, offset: real(fd, count - 8, offset)
    )
    with pytest.raises(OSError, match="63 of 64 pages") as caught:
        small.save_pages(make_file())
    assert caught.value.errno == errno.EIO


def test_memory_of_which_a_part_stands_on_another_file_is_written_whole(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever heard of the error gives a copy of the old file for the next save, or a hole."""
    monkeypatch.setattr(memory_module, "LOW_RAM_LIMIT_BYTES", SMALL // 2)
    memory = GuestMemory(SMALL)
    real = memory_module._Ram.lay_image

    def fail(ram: memory_module._Ram, fd: int) -> None:
        if ram.gpa:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        real(ram, fd)

    try:
        memory.write(0, fill(0) + fill(1))
        memory.write(HIGH_RAM_GPA, fill(2))
        lost = make_file()
        memory.save_pages(lost)
        with monkeypatch.context() as patch:
            patch.setattr(memory_module._Ram, "lay_image", fail)
            with pytest.raises(HostError, match="Cannot allocate"):
                memory.lay_image(lost)
        memory.write(0, bytes(PAGE_BYTES))
        old = make_file()
        os.pwrite(old, fill(9) * PAGES, 0)
        assert memory.save_pages(old) == SMALL
        low, high = memory.read(0, SMALL // 2), memory.read(HIGH_RAM_GPA, SMALL // 2)
        assert os.pread(old, SMALL, 0) == low + high
        memory.lay_image(old)
        assert memory.save_pages(make_file(source=old)) == 0
    finally:
        memory.close()


def test_what_is_no_image_of_it_is_refused(make_file: MakeFile) -> None:
    own = GuestMemory(SMALL)
    for length in (0, SMALL - PAGE_BYTES, SMALL + PAGE_BYTES):
        with pytest.raises(CallerError, match=f"an image of {length} bytes"):
            own.lay_image(make_file(length))
    own.close()
    shared = GuestMemory(SMALL, shared=True)
    with pytest.raises(CallerError, match="other processes share"):
        shared.lay_image(make_file())
    with pytest.raises(CallerError, match="cannot be saved"):
        shared.save_pages(make_file())
    shared.close()


def test_pages_that_are_as_in_the_image_are_found_and_dropped(
    make_file: MakeFile,
) -> None:
    image = make_file()
    os.pwrite(image, fill(1) + fill(2) + fill(3), PAGE_BYTES)
    memory = GuestMemory(SMALL)
    try:
        memory.lay_image(image)
        for page in (1, 2, 5):
            memory.write(page * PAGE_BYTES, b"x")
        memory.write(3 * PAGE_BYTES, b"stays")
        memory.write(PAGE_BYTES, fill(1)[:1] + fill(1)[1:])
        memory.write(2 * PAGE_BYTES, fill(2))
        memory.write(5 * PAGE_BYTES, b"\0")  # a hole of the image
        before = memory.read(0, SMALL)
        found = memory.as_in_image()
        assert found == [(PAGE_BYTES, 2 * PAGE_BYTES), (5 * PAGE_BYTES, PAGE_BYTES)]
        memory.write(2 * PAGE_BYTES, b"meanwhile")
        again = memory.as_in_image(found)
        assert again == [(PAGE_BYTES, PAGE_BYTES), (5 * PAGE_BYTES, PAGE_BYTES)]
        for gpa, length in again:
            memory.discard(gpa, length)
        expected = bytearray(before)
        expected[2 * PAGE_BYTES : 2 * PAGE_BYTES + 9] = b"meanwhile"
        assert memory.read(0, SMALL) == bytes(expected)
        assert memory.as_in_image() == []
        assert memory.save_pages(make_file(source=image)) == 2 * PAGE_BYTES
    finally:
        memory.close()


def test_it_is_the_last_image_that_pages_are_compared_with(
    small: GuestMemory, make_file: MakeFile
) -> None:
    """Else a page would be dropped that is as in the image before, and become another."""
    small.write(0, fill(7))
    assert small.as_in_image() == [], "without an image there is nothing to go back to"
    first = make_file()
    small.save_pages(first)
    small.lay_image(first)
    small.write(0, fill(8))
    second = make_file(source=first)
    small.save_pages(second)
    small.lay_image(second)
    small.write(0, fill(7))
    assert small.as_in_image() == []
    small.write(0, fill(8))
    assert small.as_in_image() == [(0, PAGE_BYTES)]


def test_above_3_gib_pages_are_compared_where_they_stand_in_the_file(make_file: MakeFile) -> None:
    image = make_file(TWO_SLOTS)
    os.pwrite(image, fill(1), LOW_RAM_LIMIT_BYTES)
    memory = GuestMemory(TWO_SLOTS)
    try:
        memory.lay_image(image)
        memory.write(HIGH_RAM_GPA, fill(1))
        memory.write(HIGH_RAM_GPA + PAGE_BYTES, fill(1))
        memory.write(LOW_RAM_LIMIT_BYTES - PAGE_BYTES, bytes(PAGE_BYTES))
        same = [(LOW_RAM_LIMIT_BYTES - PAGE_BYTES, PAGE_BYTES), (HIGH_RAM_GPA, PAGE_BYTES)]
        assert memory.as_in_image() == same
        assert memory.as_in_image(same) == same
    finally:
        memory.close()
