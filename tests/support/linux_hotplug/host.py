"""Runs in the dev VM: a Linux guest whose devices come and go, that is paused and has a balloon.

Arguments: kernel, base image, rounds of plugging. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmcell_protos.errors import VmcellError
from vmcell_runtime import handle
from vmcell_runtime.config import BlkConfig, MachineConfig, PmemConfig, VsockConfig

GUEST = Path(__file__).with_name("guest.py")
PORT = 1024
MEMORY_MIB = 256
BALLOON_MIB = 128
PAUSE_S = 2.0
DEADLINE_S = 90
COMMAND_LINE = (
    "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/usr/bin/python3.11 panic=-1 "
    "loglevel=5 -- -I -S /dev/vda"
)


class Guest:
    """The VMM and the stream to its PID 1."""

    def __init__(self, vmm: handle.VmmHandle) -> None:
        self.vmm = vmm
        self.sock = vmm.accept_vsock(PORT)
        self.sock.settimeout(DEADLINE_S)
        self._stream = self.sock.makefile("rw")

    def ask(self, name: str, *arguments: object) -> dict[str, Any]:
        self._stream.write(json.dumps([name, *arguments]) + "\n")
        self._stream.flush()
        line = self._stream.readline()
        if not line:
            raise EOFError(f"the guest ended at {name} {arguments}")
        answer: dict[str, Any] = json.loads(line)
        if "traceback" in answer:
            raise RuntimeError(f"the guest at {name} {arguments}: {answer['traceback']}")
        return answer

    def resident_mib(self) -> int:
        status = Path(f"/proc/{self.vmm.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) >> 10

    def wait(self, what: str, seen: Any) -> float:
        """Seconds until `seen` is true."""
        start = time.monotonic()
        while not seen():
            if time.monotonic() - start > DEADLINE_S:
                raise TimeoutError(what)
            time.sleep(0.05)
        return round(time.monotonic() - start, 2)


def image(folder: Path, name: str, length: int) -> Path:
    """A file whose 4 KiB pages begin with their own offset."""
    path = folder / name
    mark = os.urandom(16)
    with path.open("wb") as file:
        for offset in range(0, length, 4096):
            file.write(offset.to_bytes(8, "little") + mark + bytes(4096 - 24))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plug(guest: Guest, kind: str, window: int, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY if kind == "pmem" else os.O_RDWR)
    try:
        getattr(guest.vmm, f"plug_{kind}")(window, fd)
    finally:
        os.close(fd)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def try_hotplug(guest: Guest, spare: range, folder: Path, rounds: int) -> dict[str, Any]:
    """A pmem and a blk, bound, read and let go of, again and again at changing windows."""
    empty = guest.ask("bind", spare[3])
    before = open_files(guest.vmm.pid)
    wrong, seconds = [], []
    for number in range(rounds):
        start = time.monotonic()
        places = {"pmem": spare[number % 24], "blk": spare[(number + 14) % 24]}
        for kind, window in places.items():
            path = image(folder, kind, (2 << 20) * (1 + number % 3))
            plug(guest, kind, window, path)
            found = guest.ask("bind", window)
            if found.get("digest") != digest(path):
                wrong.append([number, kind, found])
        for window in places.values():
            guest.ask("unbind", window)
            guest.vmm.unplug(window)
            if guest.ask("bind", window) != empty:
                wrong.append([number, window, "is not empty afterwards"])
        seconds.append(round(time.monotonic() - start, 2))
    after = open_files(guest.vmm.pid)
    return {"empty": empty, "wrong": wrong, "round_s": seconds, "open_files": [before, after]}


def try_shared_line(guest: Guest, spare: range, folder: Path) -> dict[str, Any]:
    """Two disks on one interrupt line, both busy; then one goes while it is still bound."""
    pair = [spare[0], spare[14]]
    for window in pair:
        plug(guest, "blk", window, image(folder, f"disk{window}", 4 << 20))
        guest.ask("bind", window)
    result = {
        "pair": pair,
        "lines": guest.ask("interrupts"),
        "reads": guest.ask("storm", pair, 300),
    }
    guest.vmm.unplug(pair[0])
    result["left"] = guest.ask("storm", pair[1:], 100)
    guest.ask("unbind", pair[0])
    plug(guest, "blk", pair[0], image(folder, "again", 2 << 20))
    result["again"] = guest.ask("bind", pair[0])["bytes"]
    for window in pair:
        guest.ask("unbind", window)
        guest.vmm.unplug(window)
    return result


def ticks_per_second(guest: Guest) -> float:
    """Of the guest's time stamp counter, by its own clock."""
    guest.ask("watch")
    time.sleep(PAUSE_S)
    passed = guest.ask("end_watch")["passed"]
    return float(passed["ticks"] / passed["monotonic"])


def try_pause(guest: Guest, clock: str) -> dict[str, Any]:
    found = guest.ask("use_clock", clock)
    rate = ticks_per_second(guest)
    guest.ask("watch")
    start = time.monotonic()
    paused = 0.0
    answers = []
    for _ in range(2):
        asked = time.monotonic()
        guest.vmm.pause()
        stands = time.monotonic()
        time.sleep(PAUSE_S)
        guest.vmm.resume()
        goes = time.monotonic()
        paused += goes - stands
        answers.append(round(1000 * (stands - asked), 1))
        guest.ask("memory")
    watched = guest.ask("end_watch")
    real = time.monotonic() - start
    watched["passed"]["counter"] = watched["passed"].pop("ticks") / rate
    return {**found, **watched, "paused": paused, "real": real, "pause_ms": answers}


def try_balloon(guest: Guest) -> dict[str, Any]:
    vmm = guest.vmm
    full = guest.ask("fill", 170)
    result: dict[str, Any] = {"guest_full": full, "full_mib": guest.resident_mib()}
    vmm.set_balloon(BALLOON_MIB)
    inflate = lambda: vmm.balloon().actual_mib == BALLOON_MIB  # noqa: E731  # one wish
    result["inflate_s"] = guest.wait("the balloon to fill", inflate)
    result["given_mib"] = guest.resident_mib()
    result["guest_given"] = guest.ask("memory")
    vmm.set_balloon(0)
    result["deflate_s"] = guest.wait("it to empty", lambda: vmm.balloon().actual_mib == 0)
    result["guest_again"] = guest.ask("fill", 170)
    result["again_mib"] = guest.resident_mib()
    vmm.set_balloon(192)
    guest.wait("the balloon to take most", lambda: vmm.balloon().actual_mib > 150)
    result["squeezed"] = guest.ask("fill", 100)
    result["after_squeeze"] = vmm.balloon()._asdict()
    vmm.set_balloon(0)
    guest.wait("it to empty", lambda: vmm.balloon().actual_mib == 0)
    guest.ask("fill", 170)
    result["again_mib"] = guest.resident_mib()
    # Without being asked: Linux reports free pages every two seconds, a sixteenth at a time.
    fallen = lambda: guest.resident_mib() < result["again_mib"] - 80  # noqa: E731  # one wish
    result["report_s"] = guest.wait("free pages to be reported", fallen)
    return result


def main() -> None:
    kernel, base_image, rounds = sys.argv[1:4]
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        script = GUEST.read_bytes()
        (folder / "vda").write_bytes(script + b"\n" * (-len(script) % 4096))
        console = folder / "console"
        opens = [
            (kernel, os.O_RDONLY),
            (base_image, os.O_RDONLY),
            (folder / "vda", os.O_RDONLY),
            (console, os.O_RDWR | os.O_CREAT),
        ]
        fds = [os.open(name, flags | os.O_CLOEXEC) for name, flags in opens]
        for fd in fds:
            opened.callback(os.close, fd)
        config = MachineConfig(
            vcpu_count=2,
            memory_mib=MEMORY_MIB,
            kernel_descriptor=0,
            pmem=(PmemConfig(descriptor=1),),
            blk=(BlkConfig(descriptor=2, read_only=True),),
            vsock=VsockConfig(guest_cid=3, listen_ports=(PORT,)),
            console_descriptor=3,
            command_line=COMMAND_LINE,
            balloon=True,
            spare_windows=24,
        )
        start = time.monotonic()
        vmm = handle.spawn(config, fds, log_fd=sys.stderr.fileno())
        opened.callback(vmm.close)
        result: dict[str, Any] = {}
        try:
            guest = Guest(vmm)
            opened.callback(guest.sock.close)
            guest.ask("memory")
            result["boot_s"] = round(time.monotonic() - start, 2)
            spare = config.spare_window_numbers
            result["pause"] = try_pause(guest, "kvm-clock")
            result["hotplug"] = try_hotplug(guest, spare, folder, int(rounds))
            result["shared"] = try_shared_line(guest, spare, folder)
            result["balloon"] = try_balloon(guest)
            result["pause_by_tsc"] = try_pause(guest, "tsc")
        except (EOFError, OSError, RuntimeError, VmcellError) as error:
            result["failed"] = f"{type(error).__name__}: {error}"
        result["console"] = console.read_text(errors="replace")[-60000:]
        sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
