"""Pseudo terminals: made in the container's own devpts, their master handed to the agent.

pts(4). The child opens /dev/pts/ptmx inside the container and the slave through TIOCGPTPEER, so no
path that the container could have replaced is trusted; the agent checks the number of the device
it is given.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios

from vmcell_agent import abi, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError, GuestError

_PTMX = "/dev/pts/ptmx"


def open_pair() -> tuple[int, int, str]:
    """Master, slave and the slave's path, in the current mount namespace."""
    with attempt(f"open a terminal at {_PTMX} in the container"):
        master = os.open(_PTMX, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if syscalls.filesystem_magic(master) != abi.DEVPTS_SUPER_MAGIC:
            raise CallerError(f"{_PTMX} of the container is not a devpts: no terminal")
        fcntl.ioctl(master, abi.TIOCSPTLCK, struct.pack("=i", 0))
        number = struct.unpack("=I", fcntl.ioctl(master, abi.TIOCGPTN, bytes(4)))[0]
        slave = fcntl.ioctl(master, abi.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return master, slave, f"/dev/pts/{number}"


def set_size(terminal: int, rows: int, columns: int) -> None:
    """TIOCSWINSZ; the foreground process group gets SIGWINCH."""
    with attempt(f"resize the terminal to {columns}x{rows}"):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))


def make_controlling(slave: int) -> None:
    """Let `slave` be the terminal of the calling session leader, which has none."""
    with attempt("take the controlling terminal"):
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def check_master(fd: int) -> None:
    """Raise GuestError unless `fd` is the master of a pseudo terminal."""
    device = os.fstat(fd).st_rdev
    if (os.major(device), os.minor(device)) != abi.PTMX_DEVICE:
        raise GuestError("the container's terminal is not a pseudo terminal's master")
