"""Guest memory: RAM and read-only file windows, reached by guest address and length only.

This is the one module that holds raw memory; host addresses leave it only towards kernel
interfaces that need them (KVM memory slots, vhost), by `GuestMemory.slots` and `host_address`.

Rules kept here (each has a test):
- A range lies wholly inside one RAM slot, or it is a GuestError. Nothing is ever shortened.
- Words shared with the guest are loaded and stored in one access of their natural width, by
  `memoryview.cast`; byte-wise packing would let the guest see half-written ring indices.
- While KVM knows the address of a slot the mapping cannot go away: each region holds a live
  buffer export of its mmap, and `close` and `unmap_file` refuse while they are pinned.
- Every RAM region has inaccessible pages on both ends.
- RAM may begin as a file that nobody writes to any more (a snapshot's): its pages are the page
  cache's until they are written, then they are ours.
- Shared RAM is a memfd sealed against any change of its size: a daemon that holds it too can
  scribble in it as the guest can, but not pull pages away under a load of ours (SIGBUS).

x86-64 keeps stores in order among each other and loads among each other. What it does not order is
a store followed by a load (publish used.idx, then read used_event): a system call or a lock must
stand between the two.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmcell_protos.errors import CallerError, GuestError, HostError
from vmcell_runtime.page_map import PAGE_BYTES, own_pages, page_map, runs

HUGE_PAGE_BYTES = 2 << 20
LOW_RAM_LIMIT_BYTES = 3 << 30  # RAM below here starts at 0; the hole holds MMIO windows
HIGH_RAM_GPA = 4 << 30  # the rest of RAM starts here
MAX_SPANS = 1024  # IOV_MAX of Linux
# asm-generic/mman.h; the mmap module lacks them
MAP_NORESERVE = 0x4000
MAP_FIXED = 0x10

Span = tuple[int, int]
"""(gpa, length in bytes) of one piece of guest RAM."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.restype = ctypes.c_int
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.mmap.restype = ctypes.c_void_p


class Slot(NamedTuple):
    """One KVM memory slot: guest address, length, host address, and if the guest may write."""

    number: int
    gpa: int
    length_bytes: int
    host_address: int
    read_only: bool


class SharedRegion(NamedTuple):
    """RAM another process may map: `length_bytes` of the guest's at `gpa`, `offset` into `fd`."""

    gpa: int
    length_bytes: int
    fd: int
    offset: int


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`, part of CPython's stable ABI since 3.11 (Include/pybuffer.h)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


class _Mapping:
    """An mmap with a live export: its address is good until `close`, and only `close` ends it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._export = _PyBuffer()
        _get_buffer(mapped, ctypes.byref(self._export), 0)
        self.address: int = self._export.buf or 0

    def close(self) -> None:
        if self.address:
            self.address = 0
            _release_buffer(ctypes.byref(self._export))
            self._mapped.close()


_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def _lay(
    address: int, length_bytes: int, protection: int, flags: int, fd: int, offset: int = 0
) -> None:
    """The file takes over these pages of a mapping of ours. Raises OSError."""
    placed = _libc.mmap(address, length_bytes, protection, flags | MAP_FIXED, fd, offset)
    if placed != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class RunPage:
    """What a vCPU shares with KVM (api.rst 5) as `bytes` and 32-bit `words`; `close` is idempotent.

    The vCPU's descriptor stays the caller's, and unlike mmap.mmap this keeps no copy of it.
    """

    def __init__(self, vcpu_fd: int, length_bytes: int) -> None:
        mapped = mmap.mmap(-1, length_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping = _Mapping(mapped)
        try:
            _lay(self._mapping.address, length_bytes, _READ_WRITE, mmap.MAP_SHARED, vcpu_fd)
        except OSError as error:
            self._mapping.close()
            raise HostError(f"mapping a vCPU's run page failed: {error.strerror}") from error
        self.bytes = memoryview(mapped)
        self.words = self.bytes.cast("I")

    def close(self) -> None:
        self.words.release()
        self.bytes.release()
        self._mapping.close()


class _Ram:
    """One slot of RAM, aligned to 2 MiB on the host, with guards on both ends.

    Anonymous, or with `shared` a memfd in which the guards are pages that nobody maps.
    """

    def __init__(self, gpa: int, length_bytes: int, offset: int, *, shared: bool) -> None:
        """`offset` is where it stands in an image of all RAM."""
        total = length_bytes + 2 * HUGE_PAGE_BYTES
        self.fd = -1
        try:
            if shared:
                self.fd = _sealed_memfd(total)
                mapped = mmap.mmap(self.fd, total, flags=mmap.MAP_SHARED | MAP_NORESERVE)
            else:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
                mapped = mmap.mmap(-1, total, flags=flags)
        except OSError as error:
            self._close_fd()
            raise HostError(
                f"mapping {length_bytes >> 20} MiB of guest memory failed: {error.strerror}; "
                "give the guest less memory or free some on the host",
                code="resource_exhausted",
            ) from error
        mapped.madvise(mmap.MADV_DONTDUMP)
        self.mapping = _Mapping(mapped)
        start = -(-(self.mapping.address + PAGE_BYTES) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        lead = start - self.mapping.address
        self._forbid(self.mapping.address, lead)
        self._forbid(start + length_bytes, total - lead - length_bytes)
        self._mapped = mapped
        self.lead_bytes = lead
        self.gpa = gpa
        self.end_gpa = gpa + length_bytes
        self.offset = offset
        self.length_bytes = length_bytes
        self.address = start
        self.bytes = memoryview(mapped)[lead : lead + length_bytes]
        self.words16 = self.bytes.cast("H")
        self.words32 = self.bytes.cast("I")
        self.words64 = self.bytes.cast("Q")

    @staticmethod
    def _forbid(address: int, length_bytes: int) -> None:
        if _libc.mprotect(address, length_bytes, 0):
            raise HostError(f"guarding guest memory failed: {os.strerror(ctypes.get_errno())}")

    def lay_image(self, fd: int) -> None:
        """The file's pages stand here instead of what was here. Raises OSError."""
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        _lay(self.address, self.length_bytes, _READ_WRITE, flags, fd, self.offset)
        self._mapped.madvise(mmap.MADV_DONTDUMP, self.lead_bytes, self.length_bytes)

    def own_pages(self, page_map_fd: int) -> bytes:
        """As `page_map.own_pages`."""
        return own_pages(page_map_fd, self.address, self.length_bytes)

    def own_spans(self, page_map_fd: int) -> list[Span]:
        """The same as (gpa, length) of stretches."""
        return [
            (self.gpa + first * PAGE_BYTES, (end - first) * PAGE_BYTES)
            for first, end in runs(self.own_pages(page_map_fd))
        ]

    def discard(self, gpa: int, length: int) -> None:
        # A hole in the file: pages of shared memory stay, whoever unmaps them.
        advice = mmap.MADV_DONTNEED if self.fd < 0 else mmap.MADV_REMOVE
        self._mapped.madvise(advice, self.lead_bytes + gpa - self.gpa, length)

    def close(self) -> None:
        for view in (self.words64, self.words32, self.words16, self.bytes):
            view.release()
        self.mapping.close()
        self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_WRITE_BYTES = 16 << 20
_ZERO_PAGE = bytes(PAGE_BYTES)


def _sealed_memfd(length_bytes: int) -> int:
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length_bytes)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except OSError:
        os.close(fd)
        raise
    return fd


def _without_zeros(ram: _Ram, flags: bytes) -> bytes:
    """The same flags without pages of zeros: behind a hole these read the same."""
    kept = bytearray(flags)
    for first, end in runs(flags):
        for page in range(first, end):
            start = page * PAGE_BYTES
            if bytes(ram.bytes[start : start + PAGE_BYTES]) == _ZERO_PAGE:
                kept[page] = 0
    return bytes(kept)


def _same_spans(ram: _Ram, fd: int, gpa: int, length: int) -> Iterator[Span]:
    """The pages of a stretch that are as in the file, neighbours together."""
    for at in range(gpa, gpa + length, _WRITE_BYTES):
        piece = min(_WRITE_BYTES, gpa + length - at)
        there = os.pread(fd, piece, ram.offset + at - ram.gpa)
        here = bytes(ram.bytes[at - ram.gpa : at - ram.gpa + piece])
        same = bytes(
            here[page : page + PAGE_BYTES] == there[page : page + PAGE_BYTES]
            for page in range(0, piece, PAGE_BYTES)
        )
        for first, end in runs(same):
            yield at + first * PAGE_BYTES, (end - first) * PAGE_BYTES


def _write_pages(ram: _Ram, fd: int, start: int, end: int) -> int:
    position = start
    while position < end:
        piece = ram.bytes[position : min(end, position + _WRITE_BYTES)]
        position += os.pwrite(fd, piece, ram.offset + position)
    return end - start


def window_bytes(file_bytes: int) -> int:
    """How long the window of such a file is: up to 2 MiB more, which is what Linux asks of pmem.

    CallerError for a file without content.
    """
    if file_bytes <= 0:
        raise CallerError(f"a pmem image has {file_bytes} bytes; give a regular file with some")
    return -(-file_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


class GuestMemory:
    """The guest's physical memory. Owns every mapping; `close` is idempotent.

    RAM of `ram_bytes` (a multiple of 4096) stands at 0 up to 3 GiB, the rest at 4 GiB. Reads and
    writes take guest physical addresses and raise GuestError unless the whole range is RAM. With
    `shared` other processes can be given the RAM (`shared_regions`). `page_map_fd`, which stays the
    caller's, is this process's page map, where its path leads nowhere by the time it is needed.
    """

    def __init__(self, ram_bytes: int, *, shared: bool = False, page_map_fd: int = -1) -> None:
        if ram_bytes <= 0 or ram_bytes % PAGE_BYTES:
            raise CallerError(f"guest memory is {ram_bytes} bytes; give a multiple of 4096")
        self.ram_bytes = ram_bytes
        low = min(ram_bytes, LOW_RAM_LIMIT_BYTES)
        self._windows: dict[int, tuple[int, int, _Mapping]] = {}  # by slot number
        self._pinned_windows: set[int] = set()
        self._pins = 0
        self.shared = shared
        self._page_map_fd = page_map_fd
        self._from_image = False
        self._image_fd = -1  # of the file that all RAM stands on, to compare with
        self._torn = False  # a part of it stands on another file than the rest
        self._ram = [_Ram(0, low, 0, shared=shared)]
        if ram_bytes > low:
            self._ram.append(_Ram(HIGH_RAM_GPA, ram_bytes - low, low, shared=shared))

    @property
    def ram_ranges(self) -> tuple[Span, ...]:
        """(gpa, length) of each RAM slot, ascending."""
        return tuple((ram.gpa, ram.end_gpa - ram.gpa) for ram in self._ram)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of guest RAM, `length` bytes or GuestError."""
        ram = self._find(gpa, length)
        offset = gpa - ram.gpa
        return bytes(ram.bytes[offset : offset + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copies `data` (bytes, or a contiguous view of bytes) into guest RAM."""
        ram = self._find(gpa, len(data))
        offset = gpa - ram.gpa
        ram.bytes[offset : offset + len(data)] = data

    def load16(self, gpa: int) -> int:
        """One 16-bit access; `gpa` is a multiple of 2."""
        ram = self._find_word(gpa, 2)
        return ram.words16[(gpa - ram.gpa) >> 1]

    def store16(self, gpa: int, value: int) -> None:
        """One 16-bit access; `gpa` is a multiple of 2, `value` below 2**16."""
        ram = self._find_word(gpa, 2)
        ram.words16[(gpa - ram.gpa) >> 1] = value

    def load32(self, gpa: int) -> int:
        """One 32-bit access; `gpa` is a multiple of 4."""
        ram = self._find_word(gpa, 4)
        return ram.words32[(gpa - ram.gpa) >> 2]

    def store32(self, gpa: int, value: int) -> None:
        """One 32-bit access; `gpa` is a multiple of 4, `value` below 2**32."""
        ram = self._find_word(gpa, 4)
        ram.words32[(gpa - ram.gpa) >> 2] = value

    def load64(self, gpa: int) -> int:
        """One 64-bit access; `gpa` is a multiple of 8."""
        ram = self._find_word(gpa, 8)
        return ram.words64[(gpa - ram.gpa) >> 3]

    def store64(self, gpa: int, value: int) -> None:
        """One 64-bit access; `gpa` is a multiple of 8, `value` below 2**64."""
        ram = self._find_word(gpa, 8)
        ram.words64[(gpa - ram.gpa) >> 3] = value

    def preadv(self, fd: int, spans: Sequence[Span], offset: int) -> int:
        """File at `offset` into guest pages; bytes read, 0 at end of file. OSError as it comes."""
        views = self._views(spans)
        return os.preadv(fd, views, offset) if views else 0

    def pwritev(self, fd: int, spans: Sequence[Span], offset: int) -> int:
        """Guest pages into a file at `offset`; bytes written. OSError as it comes."""
        views = self._views(spans)
        return os.pwritev(fd, views, offset) if views else 0

    def readv(self, fd: int, spans: Sequence[Span]) -> int:
        """Stream, socket or TAP into guest pages; bytes read. BlockingIOError as it comes."""
        views = self._views(spans)
        return os.readv(fd, views) if views else 0

    def writev(self, fd: int, spans: Sequence[Span]) -> int:
        """Guest pages into a stream, socket or TAP; bytes written. OSError as it comes."""
        views = self._views(spans)
        return os.writev(fd, views) if views else 0

    def host_address(self, gpa: int, length: int) -> int:
        """Where a checked range stands in this process; only for kernel interfaces (vhost).

        Good while the memory is pinned.
        """
        ram = self._find(gpa, length)
        return ram.address + gpa - ram.gpa

    def discard(self, gpa: int, length: int) -> None:
        """Gives the whole pages within a range of RAM back to the host.

        They read as zero then, or as in the image that the RAM began as.

        Pieces of pages at its ends stay. GuestError unless the whole range is RAM.
        """
        ram = self._find(gpa, length)
        start = -(-gpa // PAGE_BYTES) * PAGE_BYTES
        end = (gpa + length) // PAGE_BYTES * PAGE_BYTES
        if start < end:
            ram.discard(start, end - start)

    def lay_image(self, fd: int) -> None:
        """All RAM is this file's content from now on, privately: `ram_bytes` long, low RAM first.

        Nobody may be using the memory, but it may be a VM's and pinned. CallerError if the file has
        another length, or if the RAM is shared.
        """
        file_bytes = os.fstat(fd).st_size
        if file_bytes != self.ram_bytes or self.shared:
            raise CallerError(
                f"an image of {file_bytes} bytes cannot be the RAM of a guest with "
                f"{self.ram_bytes} bytes{' that other processes share' if self.shared else ''}",
                code="failed_precondition",
            )
        try:
            for ram in self._ram:
                ram.lay_image(fd)
        except OSError as error:
            self._torn = True
            raise HostError(f"mapping the image of a guest's memory failed: {error}") from error
        self._from_image, self._torn = True, False
        self._forget_image()
        self._image_fd = os.dup(fd)

    def _forget_image(self) -> None:
        if self._image_fd >= 0:
            os.close(self._image_fd)
            self._image_fd = -1

    def as_in_image(self, among: Sequence[Span] | None = None) -> list[Span]:
        """Own pages, of `among` or of all RAM, that hold what the image holds there: `discard`
        changes nothing but what they cost. Whoever does it sees to it that nobody writes meanwhile.

        None without an image, or while a part of the RAM stands on another. Raises OSError.
        """
        if self._image_fd < 0 or self._torn:
            return []
        with page_map(self._page_map_fd) as page_map_fd:
            own = [
                (ram, span)
                for ram in self._ram
                for span in (among if among is not None else ram.own_spans(page_map_fd))
                if ram.gpa <= span[0] < ram.end_gpa
            ]
        return [same for ram, span in own for same in _same_spans(ram, self._image_fd, *span)]

    def save_pages(self, fd: int) -> int:
        """Writes every page that is not as in the image, or all but zeros without one; bytes. All
        of them where `lay_image` failed half way.

        `fd` is open for writing on a file of `ram_bytes`: a copy of the image, or a hole. Nobody
        may be writing to the memory. CallerError if the RAM is shared; OSError as it comes.
        """
        if self.shared:
            raise CallerError("memory that other processes share cannot be saved")
        written = 0
        with page_map(self._page_map_fd) as page_map_fd:
            for ram in self._ram:
                flags = ram.own_pages(page_map_fd)
                if self._torn:
                    flags = b"\1" * len(flags)
                elif not self._from_image:
                    flags = _without_zeros(ram, flags)
                for first, end in runs(flags):
                    written += _write_pages(ram, fd, first * PAGE_BYTES, end * PAGE_BYTES)
        return written

    def map_file(self, fd: int, gpa: int) -> Slot:
        """Maps a whole file read-only at `gpa`, a multiple of 2 MiB, as a window.

        The length is `window_bytes` of the file's; behind the file the window reads as zero. The
        file stays the page cache's: MAP_SHARED and PROT_READ. `fd` may be closed afterwards.
        Devices cannot read or write this window; only the guest can read it.
        """
        slot = self.reserve_window(window_bytes(os.fstat(fd).st_size), gpa)
        try:
            self.lay_file(slot.number, fd)
        except BaseException:
            self.unmap_file(slot.number)
            raise
        return slot

    def reserve_window(self, length_bytes: int, gpa: int) -> Slot:
        """A window that reads as zero until `lay_file`; both are multiples of 2 MiB."""
        if gpa % HUGE_PAGE_BYTES or self._overlaps(gpa, length_bytes):
            raise CallerError(f"a pmem window of {length_bytes} bytes cannot stand at {gpa:#x}")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            mapping = _Mapping(mmap.mmap(-1, length_bytes, flags=flags, prot=mmap.PROT_READ))
        except OSError as error:
            raise HostError(f"mapping a pmem image failed: {error.strerror}") from error
        number = len(self._ram)
        while number in self._windows:
            number += 1
        self._windows[number] = (gpa, length_bytes, mapping)
        return self._window_slot(number)

    def lay_file(self, number: int, fd: int) -> None:
        """The file's content stands in the window of slot `number`, which may be pinned.

        CallerError unless the window is as long as `window_bytes` says.
        """
        _, length_bytes, mapping = self._windows[number]
        file_bytes = os.fstat(fd).st_size
        if window_bytes(file_bytes) != length_bytes:
            raise CallerError(
                f"an image of {file_bytes} bytes does not fit a window of {length_bytes} bytes"
            )
        try:
            _lay(mapping.address, file_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd)
        except OSError as error:
            raise HostError(f"mapping a pmem image failed: {error.strerror}") from error

    def unmap_file(self, number: int) -> None:
        """Ends the window of slot `number`, whose number is free then; BufferError while pinned."""
        if number in self._pinned_windows:
            raise BufferError(f"slot {number} is still a VM's; take it from the VM first")
        _, _, mapping = self._windows.pop(number)
        mapping.close()

    def slots(self) -> tuple[Slot, ...]:
        """Every KVM memory slot, RAM first. The addresses are good while the memory is pinned."""
        ram = [
            Slot(number, ram.gpa, ram.end_gpa - ram.gpa, ram.address, read_only=False)
            for number, ram in enumerate(self._ram)
        ]
        return (*ram, *(self._window_slot(number) for number in sorted(self._windows)))

    def pin_window(self, number: int) -> None:
        """Forbids `unmap_file` of this slot until `unpin_window`."""
        self._pinned_windows.add(number)

    def unpin_window(self, number: int) -> None:
        self._pinned_windows.remove(number)

    def shared_regions(self) -> tuple[SharedRegion, ...]:
        """What another process must map to reach all RAM; empty unless the memory is shared.

        The descriptors stay this object's.
        """
        return tuple(
            SharedRegion(ram.gpa, ram.end_gpa - ram.gpa, ram.fd, ram.lead_bytes)
            for ram in self._ram
            if ram.fd >= 0
        )

    def pin(self) -> None:
        """Forbids `close` until `unpin`; whoever hands slots to the kernel holds one."""
        self._pins += 1

    def unpin(self) -> None:
        self._pins -= 1

    def close(self) -> None:
        """Unmaps everything; BufferError while pinned, so no kernel slot outlives its memory."""
        if self._pins:
            raise BufferError("guest memory is still pinned by a VM; close the VM first")
        self._forget_image()
        for ram in self._ram:
            ram.close()
        for _, _, mapping in self._windows.values():
            mapping.close()
        self._ram.clear()
        self._windows.clear()

    def _window_slot(self, number: int) -> Slot:
        gpa, length, mapping = self._windows[number]
        return Slot(number, gpa, length, mapping.address, read_only=True)

    def _find(self, gpa: int, length: int) -> _Ram:
        for ram in self._ram:
            if length >= 0 and ram.gpa <= gpa and gpa + length <= ram.end_gpa:
                return ram
        raise GuestError(f"guest range {gpa:#x} of {length} bytes is not inside one RAM slot")

    def _find_word(self, gpa: int, width: int) -> _Ram:
        if gpa % width:
            raise GuestError(f"guest address {gpa:#x} is not a multiple of {width}")
        return self._find(gpa, width)

    def _views(self, spans: Sequence[Span]) -> list[memoryview]:
        if len(spans) > MAX_SPANS:
            raise GuestError(f"a guest buffer has {len(spans)} pieces; at most {MAX_SPANS}")
        views = []
        for gpa, length in spans:
            ram = self._find(gpa, length)
            views.append(ram.bytes[gpa - ram.gpa : gpa - ram.gpa + length])
        return views

    def _overlaps(self, gpa: int, length: int) -> bool:
        taken = [*self.ram_ranges, *((start, size) for start, size, _ in self._windows.values())]
        return any(gpa < start + size and start < gpa + length for start, size in taken)
