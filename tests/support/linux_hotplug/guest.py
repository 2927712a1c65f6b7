"""PID 1 of the hot-plug test: does what the host asks over one vsock stream, a JSON line each.

Lies on /dev/vda and is run from there by the base image's Python; standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST_CID, PORT = 2, 1024
DRIVER = Path("/sys/bus/platform/drivers/virtio-mmio")
DEVICES = Path("/sys/bus/platform/devices")
CLOCKS = {
    "monotonic": time.CLOCK_MONOTONIC,
    "raw": time.CLOCK_MONOTONIC_RAW,
    "boottime": time.CLOCK_BOOTTIME,
    "realtime": time.CLOCK_REALTIME,
}
DEADLINE_S = 60
MIB = 1 << 20


def mount(source: str, target: str, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), f"mounting {target}")


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (result := found()):
        if time.monotonic() > deadline:
            raise TimeoutError("nothing came")
        time.sleep(0.01)
    return result


def disk_of(window: int) -> str:
    """The name of the block device below a window, or nothing."""
    folder = DEVICES / f"virtio-mmio.{window}"
    names = [Path(path).name for path, _, _ in os.walk(folder) if Path(path).parent.name == "block"]
    return names[0] if names and Path("/dev", names[0]).exists() else ""


def content_of(window: int) -> tuple[str, bytes] | None:
    """Name and content of the disk of a window, or None while it is not there to be opened.

    A pmem disk is added by a worker of the kernel: its node exists before it can be opened.
    """
    name = disk_of(window)
    if not name:
        return None
    try:
        return name, Path("/dev", name).read_bytes()
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return None
        raise


def bind(window: int) -> dict[str, Any]:
    """Has Linux look at the window; the errno if it finds nothing there."""
    try:
        (DRIVER / "bind").write_text(f"virtio-mmio.{window}")
    except OSError as error:
        return {"errno": error.errno}
    name, content = wait_for(lambda: content_of(window))
    return {
        "name": name,
        "bytes": len(content),
        "digest": hashlib.sha256(content).hexdigest(),
        "read_only": Path("/sys/block", name, "ro").read_text().strip(),
    }


def unbind(window: int) -> dict[str, Any]:
    (DRIVER / "unbind").write_text(f"virtio-mmio.{window}")
    wait_for(lambda: not disk_of(window))
    return {}


def storm(windows: list[int], reads: int) -> dict[str, Any]:
    """Direct reads of one page from several disks at once, each answered by an interrupt."""
    done: dict[str, int] = {}

    def read(window: int) -> None:
        fd = os.open(f"/dev/{disk_of(window)}", os.O_RDONLY | os.O_DIRECT)
        pages = os.lseek(fd, 0, os.SEEK_END) // 4096
        with mmap.mmap(-1, 4096) as buffer:
            for number in range(reads):
                page = random.randrange(pages)
                os.preadv(fd, [buffer], page * 4096)
                assert buffer[:8] == (page * 4096).to_bytes(8, "little"), (window, page)
                done[str(window)] = number + 1
        os.close(fd)

    threads = [threading.Thread(target=read, args=(window,)) for window in windows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    return done


def interrupts() -> dict[str, Any]:
    """The lines of /proc/interrupts that virtio devices share."""
    rows = Path("/proc/interrupts").read_text().splitlines()
    return {"shared": [row.split()[-2:] for row in rows if row.count("virtio") > 1]}


def use_clock(source: str) -> dict[str, Any]:
    """Has Linux measure time by `source` from now on; which one it uses then."""
    folder = Path("/sys/devices/system/clocksource/clocksource0")
    if source in (folder / "available_clocksource").read_text().split():
        (folder / "current_clocksource").write_text(source)
    return {"source": (folder / "current_clocksource").read_text().strip()}


class Counter:
    """The time stamp counter: rdtsc; shl $32, %rdx; or %rdx, %rax; ret."""

    def __init__(self) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        self._code = mmap.mmap(-1, 4096, prot=protection)
        self._code.write(b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3")
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self.read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)


class Watch:
    """Reads all clocks every few milliseconds; none may go back while it does."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._stop = threading.Event()
        self._sampled = threading.Event()
        self._samples = 0
        self._start = self._read()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._sampled.wait(DEADLINE_S)

    def end(self) -> dict[str, Any]:
        self._stop.set()
        self._thread.join()
        now = self._read()
        passed = {name: now[name] - self._start[name] for name in now}
        return {"passed": passed, "samples": self._samples}

    def _run(self) -> None:
        before = self._start
        while not self._stop.is_set():
            time.sleep(0.005)
            now = self._read()
            for name in now:
                if now[name] < before[name]:
                    raise AssertionError(f"{name} went back from {before[name]} to {now[name]}")
            self._samples += 1
            self._sampled.set()
            before = now

    def _read(self) -> dict[str, float]:
        clocks = {name: time.clock_gettime(number) for name, number in CLOCKS.items()}
        return {**clocks, "ticks": self._counter.read()}


def fill(mib: int) -> dict[str, Any]:
    """Uses so much memory for a moment: all pages are written, then freed."""
    with mmap.mmap(-1, mib * MIB) as room:
        for page in range(0, mib * MIB, 4096):
            room[page] = 1
    return memory()


def memory() -> dict[str, Any]:
    rows = Path("/proc/meminfo").read_text().splitlines()
    wanted = ("MemTotal", "MemFree", "MemAvailable")
    return {
        row.split(":")[0]: int(row.split()[1]) // 1024 for row in rows if row.startswith(wanted)
    }


def main() -> None:
    mount("sysfs", "/sys", "sysfs")
    mount("proc", "/proc", "proc")
    watches: list[Watch] = []
    counter = Counter()
    deeds: dict[str, Callable[..., dict[str, Any]]] = {
        "bind": bind,
        "unbind": unbind,
        "storm": storm,
        "interrupts": interrupts,
        "watch": lambda: watches.append(Watch(counter)) or {},  # type: ignore[func-returns-value]  # short
        "end_watch": lambda: watches.pop().end(),
        "fill": fill,
        "memory": memory,
        "use_clock": use_clock,
    }
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.connect((HOST_CID, PORT))
    with sock.makefile("rw") as stream:
        for line in stream:
            name, *arguments = json.loads(line)
            try:
                answer = deeds[name](*arguments)
            except Exception:  # noqa: BLE001  # the host raises it
                answer = {"traceback": traceback.format_exc()}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


if __name__ == "__main__":
    # The end of PID 1, good or bad, is a kernel panic: so the host learns that all is done.
    main()
