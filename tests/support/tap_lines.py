"""TAPs that are up in network namespaces of nobody else, each with a socket at its other end.

Made by a process of its own, which needs no root: it may have a user namespace. A TAP and its
namespace live as long as the descriptors.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from vmcell_runtime.virtio import host_abi

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_NAME = "tap0"


class TapLine(NamedTuple):
    """A TAP for a VMM, and what sends whole frames to its guest."""

    tap_fd: int
    wire: socket.socket


@contextmanager
def tap_lines(count: int) -> Iterator[list[TapLine]]:
    """So many of them, closed at the end."""
    with ExitStack() as opened:
        yield [_tap_line(opened) for _ in range(count)]


def _tap_line(opened: ExitStack) -> TapLine:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = [sys.executable, __file__, str(theirs.fileno())]
        subprocess.run(arguments, check=True, pass_fds=[theirs.fileno()], timeout=60)
        _, fds, _, _ = socket.recv_fds(ours, 1, 2)
    tap_fd, wire_fd = fds
    opened.callback(os.close, tap_fd)
    return TapLine(tap_fd, opened.enter_context(socket.socket(fileno=wire_fd)))


def _make(sock: socket.socket) -> None:
    """In the process of its own."""
    spaces = _CLONE_NEWNET | (_CLONE_NEWUSER if os.geteuid() else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(spaces):
        raise OSError(ctypes.get_errno(), "a network namespace cannot be made")
    tap_fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = host_abi.IFF_TAP | host_abi.IFF_NO_PI | host_abi.IFF_VNET_HDR
    fcntl.ioctl(tap_fd, host_abi.TUNSETIFF, host_abi.IFREQ.pack(_NAME.encode(), flags))
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # sends, and hears nothing
    name = _NAME.encode()
    _, found = host_abi.IFREQ.unpack(fcntl.ioctl(wire, _SIOCGIFFLAGS, host_abi.IFREQ.pack(name, 0)))
    fcntl.ioctl(wire, _SIOCSIFFLAGS, host_abi.IFREQ.pack(name, found | _IFF_UP))
    wire.bind((_NAME, 0))
    wire.setblocking(False)
    socket.send_fds(sock, [b"."], [tap_fd, wire.fileno()])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _sock:
        _make(_sock)
