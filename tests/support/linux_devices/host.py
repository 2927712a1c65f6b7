"""Runs in the dev VM: a microVM with every device, and the host's end of each; prints JSON.

Arguments: kernel, base image, "kernel" or "user" for who moves the frames, "tap" or "pod" for where
they go (a TAP of the host, or a pod's interface and its peer), bytes per transfer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from pod_namespaces import namespaces

from vmcell_protos.errors import GuestError
from vmcell_runtime import handle
from vmcell_runtime.config import (
    BlkConfig,
    MachineConfig,
    NetConfig,
    PmemConfig,
    VsockConfig,
)
from vmcell_runtime.virtio import host_abi
from vmcell_shim import pod_network

GUEST = Path(__file__).with_name("guest.py")
# Not vmc*: noded, when it has run, guards interfaces of that name.
TAP, HOST, PEER = "devices0", "192.0.2.1", "192.0.2.2"
MAC = "02:c0:ff:ee:00:01"
STREAM_PORT, REPORT_PORT, ECHO_PORT = 1024, 1026, 1025
ECHOES = 20
DEADLINE_S = 120
COMMAND_LINE = (
    "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/usr/bin/python3.11 panic=-1 "
    "-- -I -S /dev/vda"
)


def make_pod(opened: ExitStack) -> tuple[int, socket.socket]:
    """The TAP beside a pod's interface, and a listener at the interface's other end."""
    pod, peer = opened.enter_context(namespaces("pod", "peer"))
    pod.joined_to(peer, "eth0", MAC)
    pod.ip(f"addr add {PEER}/30 dev eth0")
    peer.ip(f"addr add {HOST}/30 dev to-eth0")
    network = pod_network.attach(pod.path)
    opened.callback(network.close)
    listener = peer.inside(lambda: socket.create_server((HOST, 5000)))
    return network.devices[0].tap_fd, opened.enter_context(listener)


def make_tap(opened: ExitStack) -> tuple[int, socket.socket]:
    """A TAP of the host, and a listener at its address."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    flags = host_abi.IFF_TAP | host_abi.IFF_NO_PI | host_abi.IFF_VNET_HDR
    fcntl.ioctl(fd, host_abi.TUNSETIFF, host_abi.IFREQ.pack(TAP.encode(), flags))
    for words in (["addr", "add", f"{HOST}/30", "dev", TAP], ["link", "set", TAP, "up"]):
        subprocess.run(["ip", *words], check=True)
    return fd, opened.enter_context(socket.create_server((HOST, 5000)))


def transfer(sock: socket.socket, sent_bytes: int) -> dict[str, Any]:
    """The other side of the guest's `transfer`: writes, half-closes, then reads to the end."""
    block = os.urandom(1 << 16)
    sending = hashlib.sha256()
    for _ in range(sent_bytes // len(block)):
        sock.sendall(block)
        sending.update(block)
    sock.shutdown(socket.SHUT_WR)
    digest, received = hashlib.sha256(), 0
    while data := sock.recv(1 << 18):
        digest.update(data)
        received += len(data)
    return {
        "sent_digest": sending.hexdigest(),
        "received": received,
        "received_digest": digest.hexdigest(),
    }


def dial_until_it_listens(vmm: handle.VmmHandle) -> socket.socket:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return vmm.connect_vsock(ECHO_PORT)
        except GuestError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def echo(vmm: handle.VmmHandle) -> int:
    for number in range(ECHOES):
        with dial_until_it_listens(vmm) as stream:
            stream.sendall(b"echo %d" % number)
            stream.shutdown(socket.SHUT_WR)
            answer = b""
            while data := stream.recv(100):
                answer += data
            assert answer == b"echo %d" % number, answer
    return ECHOES


def serve(listener: socket.socket, result: dict[str, Any], sent_bytes: int) -> None:
    sock, _ = listener.accept()
    with sock:
        result["network"] = transfer(sock, sent_bytes)


def drive(vmm: handle.VmmHandle, listener: socket.socket, sent_bytes: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    server = threading.Thread(target=serve, args=(listener, result, sent_bytes), daemon=True)
    server.start()
    with vmm.accept_vsock(STREAM_PORT) as stream, vmm.accept_vsock(REPORT_PORT) as report:
        result["vsock"] = transfer(stream, sent_bytes)
        result["echoes"] = echo(vmm)
        report.settimeout(DEADLINE_S)
        text = b""
        while data := report.recv(1 << 16):
            text += data
        server.join(DEADLINE_S)
    result["guest"] = json.loads(text or b"{}")
    result["exit"] = vmm.wait_exit()._asdict()
    return result


def main() -> None:
    kernel, base_image, path, place, sent_bytes = sys.argv[1:6]
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        script = GUEST.read_bytes()
        (folder / "vda").write_bytes(script + b"\n" * (-len(script) % 4096))
        (folder / "vdb").touch()
        os.truncate(folder / "vdb", 64 << 20)
        opens = [
            (kernel, os.O_RDONLY),
            (base_image, os.O_RDONLY),
            (folder / "vda", os.O_RDONLY),
            (folder / "vdb", os.O_RDWR),
            (folder / "console", os.O_RDWR | os.O_CREAT),
        ]
        fds = [os.open(name, flags | os.O_CLOEXEC) for name, flags in opens]
        for fd in fds:
            opened.callback(os.close, fd)
        config = MachineConfig(
            vcpu_count=1,
            memory_mib=256,
            kernel_descriptor=0,
            pmem=(PmemConfig(descriptor=1),),
            blk=(BlkConfig(descriptor=2, read_only=True), BlkConfig(descriptor=3)),
            net=(NetConfig(tap_descriptor=5, mac=MAC, in_kernel=path == "kernel"),),
            vsock=VsockConfig(guest_cid=3, listen_ports=(STREAM_PORT, REPORT_PORT)),
            console_descriptor=4,
            command_line=f"{COMMAND_LINE} {PEER} {HOST} {sent_bytes}",
        )
        tap_fd, listener = make_pod(opened) if place == "pod" else make_tap(opened)
        vmm = handle.spawn(config, [*fds, tap_fd], log_fd=sys.stderr.fileno())
        opened.callback(vmm.close)
        # A guest that fails ends its streams, so nothing here waits for ever.
        result = drive(vmm, listener, int(sent_bytes))
        result["vhost_opened"] = Path("/dev/vhost-net").exists()
        result["console"] = (folder / "console").read_text(errors="replace")[-4000:]
        sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
