"""PID 1 of the snapshot test: counts, keeps sums in memory and on a disk, and tells each step.

Lies on /dev/vda and is run from there by the base image's Python; standard library only. Each step
makes the next link of a chain of SHA-256 digests, which anybody can compute, writes it to a block
of /dev/vdb of its own, and tells it over vsock and TCP. A vsock that was reset is dialled again and
told what memory and disk hold by then.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import socket
import struct
import sys
import time

HOST_CID = 2
CONTROL_PORT = 1024
BLOCK_BYTES = 4096
BLOCKS = 256
BALLAST_BYTES = 8 << 20
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # linux/sockios.h
IFF_UP_RUNNING = 0x41


def mount(source: str, target: str, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), f"mounting {target}")


def link(step: int, digest: bytes) -> bytes:
    return hashlib.sha256(digest + step.to_bytes(8, "little")).digest()


def dial() -> socket.socket:
    while True:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.connect((HOST_CID, CONTROL_PORT))
        except OSError:
            sock.close()
            continue
        return sock


def open_tcp(address: str, peer: str) -> socket.socket:
    def request(number: int, ip: str) -> None:
        place = struct.pack("<16sH2s4s8x", b"eth0", socket.AF_INET, b"", socket.inet_aton(ip))
        fcntl.ioctl(control, number, place)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request(SIOCSIFADDR, address)
        request(SIOCSIFNETMASK, "255.255.255.252")
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("<16sH22x", b"eth0", IFF_UP_RUNNING))
    return socket.create_connection((peer, 5000), timeout=60)


class Worker:
    """The chain, its blocks on the disk, and memory that must not change."""

    def __init__(self) -> None:
        self.step = 0
        self.digest = bytes(32)
        self.disk = os.open("/dev/vdb", os.O_RDWR | os.O_DIRECT)
        self.page = mmap.mmap(-1, BLOCK_BYTES)
        self.ballast = b"".join(
            hashlib.sha256(number.to_bytes(8, "little")).digest() * 128
            for number in range(BALLAST_BYTES // BLOCK_BYTES)
        )

    def go_on(self) -> None:
        self.step += 1
        self.digest = link(self.step, self.digest)
        self.page[:40] = self.step.to_bytes(8, "little") + self.digest
        os.pwritev(self.disk, [self.page], self.step % BLOCKS * BLOCK_BYTES)
        if self.step % 8 == 0:
            os.fsync(self.disk)

    def audit(self) -> dict[str, object]:
        """What memory and disk hold: the ballast's digest, and wrong blocks of the last lap."""
        digest, wrong = bytes(32), []
        for step in range(1, self.step + 1):
            digest = link(step, digest)
            if step > self.step - BLOCKS:
                os.preadv(self.disk, [self.page], step % BLOCKS * BLOCK_BYTES)
                if self.page[:40] != step.to_bytes(8, "little") + digest:
                    wrong.append(step)
        return {
            "ballast": hashlib.sha256(self.ballast).hexdigest(),
            "wrong_blocks": wrong,
            "chain": digest == self.digest,
        }


def main() -> None:
    address, peer = sys.argv[1], sys.argv[2]
    mount("sysfs", "/sys", "sysfs")
    worker = Worker()
    tcp: socket.socket | None = open_tcp(address, peer)
    control = dial()
    while True:
        worker.go_on()
        row: dict[str, object] = {
            "step": worker.step,
            "digest": worker.digest.hex(),
            "monotonic_ns": time.monotonic_ns(),
        }
        try:
            control.sendall(json.dumps(row).encode() + b"\n")
        except OSError as error:
            control.close()
            control = dial()
            row |= {"error": str(error), "audit": worker.audit()}
            control.sendall(json.dumps(row).encode() + b"\n")
        if tcp is not None:
            try:
                tcp.sendall(worker.step.to_bytes(8, "little"))
            except OSError:
                tcp = None


if __name__ == "__main__":
    main()
