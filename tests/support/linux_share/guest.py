"""PID 1 of the share test: containers' children that take live directories as the agent does.

Lies on /dev/vda and is run from there by the base image's Python; the agent's own code does the
mounting. The host says which step comes next, one word a line, and gets one line of JSON for each.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.append("/usr/lib/vmcell/python")

from vmcell_agent import abi, containerfs, liveshare, mountoptions, syscalls

HOST_CID = 2
PORT = 1024
SHARE = "/run/.share"
DEADLINE_S = 60
WRITTEN_BYTES = 10 << 20


def in_container(rows: list[tuple[str, str, list[str]]], step: Callable[[], Any]) -> Any:
    """What `step` finds in a root of its own with these (destination, number, options) mounts."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            found = enter(rows, step)
        except Exception as error:  # noqa: BLE001, the test shows it
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(write_end, json.dumps(found).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def enter(rows: list[tuple[str, str, list[str]]], step: Callable[[], Any]) -> Any:
    mounts = tuple(
        mountoptions.parse_mount(place, "virtiofs", options, "m", source=number)
        for place, number, options in rows
    )
    syscalls.unshare(abi.CLONE_NEWNS)
    trees = containerfs.clone_trees(mounts, shared_memory="", live_share=SHARE)
    syscalls.mount("tmpfs", "/tmp", "tmpfs")
    containerfs.enter_root("/tmp", 0)
    containerfs.mount_all(mounts, trees)
    containerfs.make_directory("/proc")
    syscalls.mount("proc", "/proc", "proc")
    return step()


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def failure(step: Callable[[], object]) -> str:
    try:
        step()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "none"


def create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))


def look(live: str, fixed: str) -> dict[str, Any]:
    """Both directories, the second read-only in the guest and on the host."""

    def step() -> dict[str, Any]:
        start = time.monotonic()
        big = digest("/live/big")
        read_s = time.monotonic() - start
        data = os.urandom(WRITTEN_BYTES)
        start = time.monotonic()
        with open("/live/answer", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        write_s = time.monotonic() - start
        create("/live/owned")
        os.chown("/live/owned", 1234, 5678)
        refused = failure(lambda: create("/fixed/new"))
        syscalls.mount("", "/fixed", "", abi.MS_BIND | abi.MS_REMOUNT)
        with open("/proc/self/mountinfo") as file:
            table = [line.split() for line in file]
        return {
            "hello": open("/live/hello").read(),
            "fixed": open("/fixed/below/hello").read(),
            "devices": len({os.stat(path).st_dev for path in ("/live", "/fixed", "/fixed/below")}),
            "big": big,
            "answer": hashlib.sha256(data).hexdigest(),
            "refused": refused,
            "refused_writable": failure(lambda: create("/fixed/new")),
            "refused_below": failure(lambda: create("/fixed/below/new")),
            "unlink": failure(lambda: os.unlink("/fixed/below/hello")),
            "mounts": {row[4]: row[5] for row in table if row[4].startswith(("/live", "/fixed"))},
            "read_s": round(read_s, 2),
            "write_s": round(write_s, 2),
        }

    return in_container([("/live", live, ["rbind"]), ("/fixed", fixed, ["rbind", "ro"])], step)


def see_change(live: str, stream: Any, say: Callable[[Any], None]) -> dict[str, Any]:
    """The host changes a file the guest has read; how long the guest sees the old one."""

    def step() -> dict[str, Any]:
        with open("/live/hello") as file:
            before = file.read()
        say("read")
        stream.readline()
        start = time.monotonic()
        while (after := open("/live/hello").read()) == before:  # noqa: SIM115
            if time.monotonic() - start > DEADLINE_S:
                break
        return {"before": before, "after": after, "stale_s": round(time.monotonic() - start, 2)}

    return in_container([("/live", live, [])], step)


def lose(live: str, stream: Any, say: Callable[[Any], None]) -> dict[str, Any]:
    """The daemon stands still, then dies, while one process waits for it and another comes late."""

    def step() -> dict[str, Any]:
        handle = os.open("/live/big", os.O_RDONLY)
        say("open")
        stream.readline()  # stopped
        pid = os.fork()
        if pid == 0:
            os._exit(107 if failure(lambda: os.stat("/live/never")).startswith("Trans") else 1)
        # It is in flight once the child sleeps in the kernel's FUSE client, where nothing wakes it.
        end = time.monotonic() + DEADLINE_S
        while state(pid) not in ("D", "S") and time.monotonic() < end:
            pass
        say("waiting")
        stream.readline()  # killed
        start = time.monotonic()
        _, status = os.waitpid(pid, 0)
        waited_s = time.monotonic() - start
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return {
            "waiting": os.waitstatus_to_exitcode(status),
            "open": failure(lambda: os.pread(handle, 4096, 5 << 20)),
            "new": failure(lambda: os.stat("/live/later")),
            "waited_s": round(waited_s, 2),
            "all_s": round(time.monotonic() - start, 2),
        }

    return in_container([("/live", live, [])], step)


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0]


def main() -> None:
    syscalls.mount("tmpfs", "/run", "tmpfs")
    os.mkdir(SHARE)
    liveshare.mount(SHARE)
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    stream.connect((HOST_CID, PORT))
    words = stream.makefile("r")

    def say(value: Any) -> None:
        stream.sendall(json.dumps(value).encode() + b"\n")

    for line in words:
        step, *numbers = line.split()
        if step == "look":
            say(look(*numbers))
        elif step == "change":
            say(see_change(numbers[0], words, say))
        elif step == "late":
            say(in_container([("/late", numbers[0], ["ro"])], lambda: digest("/late/big")))
        elif step == "file":
            say(in_container([("/etc/one", numbers[0], ["ro"])], lambda: digest("/etc/one")))
        elif step == "missing":
            say(in_container([("/data", numbers[0], [])], lambda: "found"))
        elif step == "lose":
            say(lose(numbers[0], words, say))
        elif step == "alive":
            # The guest goes on; a new container with a live directory cannot start.
            say([ctypes.CDLL(None).getpid(), in_container([("/live", numbers[0], [])], lambda: 0)])


if __name__ == "__main__":
    # The end of PID 1, good or bad, is a kernel panic: so the host learns that all is done.
    main()
