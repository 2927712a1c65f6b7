"""Which pages of a mapping are this process's own, and not a file's or nobody's.

/proc/PID/pagemap has eight bytes for each page; of the last one bit 7 is present, 6 swapped, 5
"file page or shared anonymous" (Documentation/admin-guide/mm/pagemap.rst).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

PAGE_BYTES = 4096
_ENTRY_BYTES = 8
_OWN_PAGE = bytes(bool(top & 0xC0) and not top & 0x20 for top in range(256))


def open_page_map() -> int:
    """This process's own page map, the caller's to close. Raises OSError."""
    return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def page_map(known_fd: int) -> Iterator[int]:
    """`known_fd`, or the page map opened for as long as this takes if it is -1. Raises OSError."""
    if known_fd >= 0:
        yield known_fd
        return
    fd = open_page_map()
    try:
        yield fd
    finally:
        os.close(fd)


def own_pages(page_map_fd: int, address: int, length_bytes: int) -> bytes:
    """A byte for each page: 1 if it is this process's own, 0 if it is untouched or a file's.

    OSError as it comes.
    """
    pages = length_bytes // PAGE_BYTES
    entries = os.pread(page_map_fd, _ENTRY_BYTES * pages, _ENTRY_BYTES * (address // PAGE_BYTES))
    if len(entries) != _ENTRY_BYTES * pages:
        told = len(entries) // _ENTRY_BYTES
        raise OSError(errno.EIO, f"the kernel tells {told} of {pages} pages")
    return entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_OWN_PAGE)


def runs(flags: bytes) -> Iterator[tuple[int, int]]:
    """(first, end) of each stretch of ones."""
    first = flags.find(1)
    while first >= 0:
        end = flags.find(0, first)
        end = end if end >= 0 else len(flags)
        yield first, end
        first = flags.find(1, end)
