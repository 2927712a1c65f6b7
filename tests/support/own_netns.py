"""A network namespace of the test's own, entered by the thread that runs the test.

Threads and processes started inside inherit it, so whatever the test starts is inside too; the
rest of the test run stays outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def own_netns() -> Iterator[None]:
    """Inside the block this thread has an empty network with its loopback up; needs root."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check("unshare", _libc().unshare(CLONE_NEWNET))
        try:
            os.system("ip link set lo up")
            yield
        finally:
            _check("setns", _libc().setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(call: str, result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")
