"""What a hostile guest has around it on the host, and what the host does meanwhile.

Disks, an image, an interface with traffic, peers of its sockets, a shared directory, and devices
that come and go.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from hostile_payload import MEMORY_MIB
from payload import memory_file
from tap_lines import TapLine

from vmcell_protos.errors import GuestError, HostError
from vmcell_runtime.config import (
    BlkConfig,
    FsConfig,
    MachineConfig,
    NetConfig,
    PmemConfig,
    VsockConfig,
)
from vmcell_runtime.handle import VmmHandle
from vmcell_shim.virtiofsd import Virtiofsd

DISK_BYTES = 1 << 20
IMAGE_BYTES = (2 << 20) - 4096
IMAGE_NAME = "hostile-image"  # in the VMM's maps
MAC = "02:c0:ff:ee:00:01"
PORTS = (1024, 1025, 1026, 1027)  # requests.c asks for these
PEERS = 16
_KERNEL, _IMAGE, _DISK, _READ_ONLY, _CONSOLE, _TAP, _SHARE = range(7)


def _file(opened: ExitStack, name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    opened.callback(os.close, fd)
    os.write(fd, content)
    return fd


class Surroundings:
    """Owns all of it until `opened` is closed; `fds` are those that `config` names."""

    def __init__(
        self, opened: ExitStack, kernel: bytes, line: TapLine, share: Path | None, seed: int
    ) -> None:
        self._opened = opened
        self._random = random.Random(seed)
        self._line = line
        self._peers: list[socket.socket] = []
        self._plugged: set[int] = set()
        content = self._random.randbytes(DISK_BYTES)
        self.console_fd = _file(opened, "console", b"")
        self.disk_fd = _file(opened, "disk", content)
        self._fixed = {
            "image": _file(opened, IMAGE_NAME, content + content[: IMAGE_BYTES - DISK_BYTES]),
            "read-only disk": _file(opened, "read-only", content),
        }
        self._digests = {name: _digest(fd) for name, fd in self._fixed.items()}
        kernel_fd = memory_file(kernel)
        opened.callback(os.close, kernel_fd)
        read_only = os.open(f"/proc/self/fd/{self._fixed['read-only disk']}", os.O_RDONLY)
        opened.callback(os.close, read_only)
        self.fds = [kernel_fd, self._fixed["image"], self.disk_fd, read_only, self.console_fd]
        self.fds.append(line.tap_fd)
        self.shared = share is not None
        if share is not None:
            self.fds.append(self._serve(share))
        self.config = self._config()

    def _config(self) -> MachineConfig:
        return MachineConfig(
            vcpu_count=2,
            memory_mib=MEMORY_MIB,
            kernel_descriptor=_KERNEL,
            console_descriptor=_CONSOLE,
            pmem=(PmemConfig(descriptor=_IMAGE),),
            blk=(BlkConfig(descriptor=_DISK), BlkConfig(descriptor=_READ_ONLY, read_only=True)),
            net=(NetConfig(tap_descriptor=_TAP, mac=MAC),),
            fs=(FsConfig(descriptor=_SHARE, tag="hostile"),) if self.shared else (),
            vsock=VsockConfig(guest_cid=3, listen_ports=PORTS),
            balloon=True,
            spare_windows=2,
        )

    def _serve(self, share: Path) -> int:
        daemon = Virtiofsd(os.fspath(share))
        self._opened.callback(daemon.close)
        self._connection = self._opened.enter_context(daemon.take_connection())
        return self._connection.fileno()

    def started(self) -> None:
        """The VMM has its copies of all; one of ours would keep a daemon alive that it gave up."""
        if self.shared:
            self._connection.close()

    # What the host does meanwhile

    def stir(self, vmm: VmmHandle) -> None:
        """A little of everything: frames, streams both ways, one device that comes or goes."""
        self._send_frames()
        self._stream(vmm)
        self._plug(vmm)

    def _send_frames(self) -> None:
        for _ in range(64):
            frame = bytes.fromhex(MAC.replace(":", "")) * 2 + b"\x08\x00"
            frame += self._random.randbytes(self._random.choice((0, 46, 600, 1400)))
            with suppress(BlockingIOError, OSError):  # its queue is full: nobody reads it now
                self._line.wire.send(frame)

    def _stream(self, vmm: VmmHandle) -> None:
        while len(self._peers) < PEERS:
            peer = vmm.accept_vsock(self._random.choice(PORTS))
            peer.setblocking(False)
            self._opened.callback(peer.close)
            self._peers.append(peer)
        for peer in self._peers:
            with suppress(OSError):
                peer.send(self._random.randbytes(4096))
            if self._random.random() < 0.5:  # the others do not read what the guest sends
                with suppress(OSError):
                    peer.recv(1 << 16)
        for _ in range(2):
            self._peers.pop(self._random.randrange(len(self._peers))).close()
        with suppress(GuestError, HostError):  # the guest answers what it likes
            vmm.connect_vsock(5000 + self._random.randrange(4), timeout_s=0.02).close()

    def _plug(self, vmm: VmmHandle) -> None:
        window = self._random.choice(self.config.spare_window_numbers)
        if window in self._plugged:
            vmm.unplug(window)
            self._plugged.remove(window)
            return
        if self._random.random() < 0.5:
            vmm.plug_blk(window, self.disk_fd)
        else:
            vmm.plug_pmem(window, self._fixed["image"])
        self._plugged.add(window)

    def unplug_all(self, vmm: VmmHandle) -> None:
        while self._plugged:
            vmm.unplug(self._plugged.pop())

    # What must be as before

    @property
    def console(self) -> bytes:
        return os.pread(self.console_fd, 2 << 20, 0)

    def changes(self) -> list[str]:
        """What the guest changed that it may not."""
        found = [
            f"the {name} has changed"
            for name, fd in self._fixed.items()
            if _digest(fd) != self._digests[name]
        ]
        length = os.fstat(self.disk_fd).st_size
        if length != DISK_BYTES:
            found.append(f"the disk has {length} bytes now, not {DISK_BYTES}")
        return found


def _digest(fd: int) -> str:
    return hashlib.sha256(os.pread(fd, 4 << 20, 0)).hexdigest()
