"""PID 1 of the device test: uses every device as a Linux program does and reports over vsock.

Lies on /dev/vda and is run from there by the base image's Python; standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import socket
import struct
import sys
import time
from typing import Any

HOST_CID = 2
STREAM_PORT, REPORT_PORT, ECHO_PORT = 1024, 1026, 1025
BLKDISCARD = 0x1277  # linux/fs.h
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # linux/sockios.h
IFF_UP_RUNNING = 0x41
ECHOES = 20
MIB = 1 << 20


def read_text(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def mount(source: str, target: str, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), f"mounting {target}")


def drivers() -> dict[str, str]:
    """Bound drivers and their device's status, by device name."""
    root = "/sys/bus/virtio/devices"
    return {
        name: f"{os.path.basename(os.readlink(f'{root}/{name}/driver'))} "
        f"{int(read_text(f'{root}/{name}/status'), 16)}"
        for name in sorted(os.listdir(root))
    }


def dial(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.connect((HOST_CID, port))
    return sock


def transfer(sock: socket.socket, sent_bytes: int) -> dict[str, Any]:
    """Reads to the end, then writes `sent_bytes`; both directions with digest and seconds."""
    digest, received, start = hashlib.sha256(), 0, time.monotonic()
    while data := sock.recv(1 << 18):
        digest.update(data)
        received += len(data)
    middle = time.monotonic()
    block = os.urandom(1 << 16)
    sending = hashlib.sha256()
    for _ in range(sent_bytes // len(block)):
        sock.sendall(block)
        sending.update(block)
    sock.shutdown(socket.SHUT_WR)
    return {
        "received": received,
        "received_digest": digest.hexdigest(),
        "receive_s": round(middle - start, 2),
        "sent_digest": sending.hexdigest(),
        "send_s": round(time.monotonic() - middle, 2),
    }


def try_disk() -> dict[str, Any]:
    disk = os.open("/dev/vdb", os.O_RDWR)
    block = os.urandom(MIB)
    for number in range(8):
        os.pwrite(disk, block, number * MIB)
    os.fsync(disk)
    os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
    same = all(os.pread(disk, MIB, number * MIB) == block for number in range(8))
    fcntl.ioctl(disk, BLKDISCARD, struct.pack("QQ", 0, 4 * MIB))
    os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
    return {
        "read_back": same,
        "discarded": os.pread(disk, 4096, 0) == bytes(4096),
        "kept": os.pread(disk, MIB, 4 * MIB) == block,
        "vda_read_only": read_text("/sys/block/vda/ro"),
        "serial": read_text("/sys/block/vdb/serial"),
    }


def echo() -> int:
    """Answers streams the host dials with what they bring."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, ECHO_PORT))
    listener.listen(8)
    for _ in range(ECHOES):
        stream, _ = listener.accept()
        with stream:
            while data := stream.recv(4096):
                stream.sendall(data)
    return ECHOES


def try_network(address: str, peer: str, sent_bytes: int) -> dict[str, Any]:
    def request(number: int, ip: str) -> None:
        place = struct.pack("<16sH2s4s8x", b"eth0", socket.AF_INET, b"", socket.inet_aton(ip))
        fcntl.ioctl(control, number, place)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request(SIOCSIFADDR, address)
        request(SIOCSIFNETMASK, "255.255.255.252")
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("<16sH22x", b"eth0", IFF_UP_RUNNING))
    with socket.create_connection((peer, 5000), timeout=60) as sock:
        result = transfer(sock, sent_bytes)
    return {"mac": read_text("/sys/class/net/eth0/address"), **result}


def main() -> None:
    address, peer, sent_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    mount("sysfs", "/sys", "sysfs")
    report: dict[str, Any] = {"kernel": os.uname().release, "drivers": drivers()}
    with dial(STREAM_PORT) as stream:
        report["vsock"] = transfer(stream, sent_bytes)
    report["disk"] = try_disk()
    with open("/dev/hwrng", "rb", buffering=0) as generator:
        report["entropy_bytes"] = len(generator.read(64))
    report["echoes"] = echo()
    report["network"] = try_network(address, peer, sent_bytes)
    with dial(REPORT_PORT) as stream:
        stream.sendall(json.dumps(report).encode())
        stream.shutdown(socket.SHUT_WR)
        # TCP still delivers what was sent; the host closes when it has all of it.
        stream.recv(1)


if __name__ == "__main__":
    # The end of PID 1, good or bad, is a kernel panic: so the host learns that all is done.
    main()
