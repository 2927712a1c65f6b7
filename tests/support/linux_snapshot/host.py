"""Runs in the dev VM: saves a working Linux guest over and over, and restores it; prints JSON.

Arguments: kernel, base image, "kernel" or "user" for who moves the frames, MiB of memory, rounds.
In each round the guest is saved (what changed, over a copy of the last file), ended, restored in
another VMM with copies of its disks, and asked whether all sums are right. In the end three clones
of one snapshot run at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmcell_runtime import handle
from vmcell_runtime.config import BlkConfig, MachineConfig, NetConfig, PmemConfig, VsockConfig
from vmcell_runtime.virtio import host_abi

GUEST = Path(__file__).with_name("guest.py")
# Its own: what an earlier run left, if it was cut off, is not in the way.
TAP = f"saved{os.getpid()}"
HOST, PEER = "192.0.2.1", "192.0.2.2"
MAC = "02:c0:ff:ee:00:01"
CONTROL_PORT = 1024
DEADLINE_S = 240
STANDING_S = 3.0
STEPS = 20
COMMAND_LINE = (
    "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/usr/bin/python3.11 panic=-1 "
    f"-- -I -S /dev/vda {PEER} {HOST}"
)


def open_tap() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = host_abi.IFF_TAP | host_abi.IFF_NO_PI | host_abi.IFF_VNET_HDR
    fcntl.ioctl(fd, host_abi.TUNSETIFF, host_abi.IFREQ.pack(TAP.encode(), flags))
    return fd


class Told:
    """What a guest says over its control stream, checked against the chain as it comes."""

    def __init__(self, vmm: handle.VmmHandle) -> None:
        self.file = vmm.accept_vsock(CONTROL_PORT)
        self.file.settimeout(DEADLINE_S)
        self.rest = b""

    def row(self) -> dict[str, Any]:
        while b"\n" not in self.rest:
            data = self.file.recv(1 << 16)
            if not data:
                raise EOFError("the guest's stream ended")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        found = json.loads(line)
        assert found["digest"] == digest_of(found["step"]), found
        return found


DIGESTS = [bytes(32)]


def digest_of(step: int) -> str:
    while len(DIGESTS) <= step:
        DIGESTS.append(hashlib.sha256(DIGESTS[-1] + len(DIGESTS).to_bytes(8, "little")).digest())
    return DIGESTS[step].hex()


class Rig:
    """Starts guests of one shape; every one has a folder with its disk."""

    def __init__(
        self, kernel: str, base_image: str, path: str, memory_mib: int, folder: Path
    ) -> None:
        self.images = (kernel, base_image)
        self.in_kernel = path == "kernel"
        self.memory_mib = memory_mib
        self.folder = folder
        script = GUEST.read_bytes()
        (folder / "vda").write_bytes(script + b"\n" * (-len(script) % 4096))

    def start(self, disk: Path, snapshot: Path | None, *, net: bool) -> handle.VmmHandle:
        with ExitStack() as opened:
            names = [(self.images[0], os.O_RDONLY), (self.images[1], os.O_RDONLY)]
            names += [(str(self.folder / "vda"), os.O_RDONLY), (str(disk), os.O_RDWR)]
            names += [(str(self.folder / "console"), os.O_RDWR | os.O_CREAT | os.O_APPEND)]
            fds = [os.open(name, flags | os.O_CLOEXEC) for name, flags in names]
            if net:
                fds.append(open_tap())
            else:
                # A clone has an interface of its own, which nobody is at the other end of.
                spare = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                flags = host_abi.IFF_TAP | host_abi.IFF_NO_PI | host_abi.IFF_VNET_HDR
                fcntl.ioctl(spare, host_abi.TUNSETIFF, host_abi.IFREQ.pack(b"clone%d", flags))
                fds.append(spare)
            for fd in fds:
                opened.callback(os.close, fd)
            saved = None
            if snapshot is not None:
                memory = opened.enter_context((snapshot / "memory").open("rb"))
                state = opened.enter_context((snapshot / "state").open("rb"))
                saved = handle.SavedFiles(memory.fileno(), state.fileno())
            config = MachineConfig(
                vcpu_count=2,
                memory_mib=self.memory_mib,
                kernel_descriptor=0,
                pmem=(PmemConfig(descriptor=1),),
                blk=(BlkConfig(descriptor=2, read_only=True), BlkConfig(descriptor=3)),
                net=(NetConfig(tap_descriptor=5, mac=MAC, in_kernel=self.in_kernel),),
                vsock=VsockConfig(guest_cid=3, listen_ports=(CONTROL_PORT,)),
                console_descriptor=4,
                command_line=COMMAND_LINE,
                balloon=True,
            )
            return handle.spawn(config, fds, log_fd=sys.stderr.fileno(), saved=saved)

    def save(
        self, vmm: handle.VmmHandle, base: Path | None, disk: Path, name: str
    ) -> tuple[Path, int]:
        """The snapshot's folder, and bytes of memory that had to be written."""
        folder = self.folder / name
        folder.mkdir()
        if base is not None:
            copy = ["cp", "--sparse=always", base / "memory", folder / "memory"]
            subprocess.run(copy, check=True)
        with (folder / "memory").open("r+b" if base else "w+b") as memory:
            memory.truncate(self.memory_mib << 20)
            with (folder / "state").open("wb") as state:
                written = vmm.save(memory.fileno(), state.fileno())
        shutil.copyfile(disk, folder / "disk")
        return folder, written


def rounds(rig: Rig, count: int, result: dict[str, Any], listener: socket.socket) -> Path:
    disk = rig.folder / "disk"
    disk.touch()
    os.truncate(disk, 1 << 20)
    vmm = rig.start(disk, None, net=True)
    told = Told(vmm)
    tcp, _ = listener.accept()
    heard = bytearray()
    threading.Thread(target=hear, args=(tcp, heard), daemon=True).start()
    for _ in range(STEPS):
        row = told.row()
    snapshot: Path | None = None
    for number in range(count):
        vmm.pause()
        began = time.monotonic()
        snapshot, written = rig.save(vmm, snapshot, disk, f"snapshot{number}")
        save_s = time.monotonic() - began
        row = drain(told, row)
        if number == count - 1:
            # From here on the TCP stream is the source's, and the clone's is out of step.
            note_tcp(result, heard)
            vmm.resume()
            for _ in range(STEPS):
                told.row()
        vmm.close()
        time.sleep(STANDING_S)
        disk = rig.folder / f"disk{number}"
        shutil.copyfile(snapshot / "disk", disk)
        began = time.monotonic()
        vmm = rig.start(disk, snapshot, net=True)
        restore_s = time.monotonic() - began
        if number:
            # The machine that stood on these files is gone; they are in the dev VM's memory.
            shutil.rmtree(rig.folder / f"snapshot{number - 1}")
        before = row
        vmm.resume()
        told = Told(vmm)
        row = told.row()
        result["rounds"].append(
            {
                "audit": row.get("audit"),
                "step": row["step"],
                "before": before["step"],
                "monotonic_s": (row["monotonic_ns"] - before["monotonic_ns"]) / 1e9,
                "written_mib": round(written / (1 << 20), 1),
                "save_s": round(save_s, 3),
                "restore_s": round(restore_s, 3),
            }
        )
        for _ in range(STEPS):
            row = told.row()
    vmm.close()
    assert snapshot is not None
    return snapshot


def drain(told: Told, row: dict[str, Any]) -> dict[str, Any]:
    """The last row that a guest which stands still has said."""
    told.file.settimeout(0.2)
    while True:
        try:
            row = told.row()
        except TimeoutError:
            told.file.settimeout(DEADLINE_S)
            return row


def note_tcp(result: dict[str, Any], heard: bytearray) -> None:
    steps = [int.from_bytes(heard[n : n + 8], "little") for n in range(0, len(heard) - 7, 8)]
    result["tcp_steps"] = len(steps)
    result["tcp_in_order"] = steps == list(range(1, len(steps) + 1))


def hear(tcp: socket.socket, heard: bytearray) -> None:
    while data := tcp.recv(1 << 16):
        heard += data


def clones(rig: Rig, snapshot: Path, result: dict[str, Any]) -> None:
    vmms = []
    for number in range(3):
        disk = rig.folder / f"clone{number}"
        shutil.copyfile(snapshot / "disk", disk)
        vmms.append(rig.start(disk, snapshot, net=False))
    for vmm in vmms:
        vmm.resume()
    for vmm in vmms:
        row = Told(vmm).row()
        result["clones"].append(row["audit"])
    for vmm in vmms:
        vmm.close()


def main() -> None:
    kernel, base_image, path, memory_mib, count = sys.argv[1:6]
    result: dict[str, Any] = {
        "rounds": [],
        "clones": [],
        "vhost_opened": Path("/dev/vhost-net").exists(),
    }
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"], check=True)
        opened.callback(subprocess.run, ["ip", "link", "del", TAP], check=True)
        for words in (["addr", "add", f"{HOST}/30", "dev", TAP], ["link", "set", TAP, "up"]):
            subprocess.run(["ip", *words], check=True)
        listener = opened.enter_context(socket.create_server((HOST, 5000)))
        rig = Rig(kernel, base_image, path, int(memory_mib), folder)
        try:
            snapshot = rounds(rig, int(count), result, listener)
            clones(rig, snapshot, result)
        finally:
            console = folder / "console"
            if console.exists():
                result["console"] = console.read_text(errors="replace")[-3000:]
            sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
