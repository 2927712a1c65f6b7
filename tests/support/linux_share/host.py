"""Runs in the dev VM: a microVM with live host directories, and the host's side of it; prints JSON.

Arguments: kernel, base image.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmcell_runtime import handle
from vmcell_runtime.config import BlkConfig, FsConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_shim.living import start_ticks
from vmcell_shim.share import TAG, Share

GUEST = Path(__file__).with_name("guest.py")
PORT = 1024
DEADLINE_S = 240
BIG_BYTES = 10 << 20
COMMAND_LINE = (
    "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/usr/bin/python3.11 panic=-1 "
    "-- -I -S /dev/vda"
)


class Guest:
    """The words to the guest and its answers."""

    def __init__(self, vmm: handle.VmmHandle, opened: ExitStack) -> None:
        self._stream = opened.enter_context(vmm.accept_vsock(PORT))
        self._stream.settimeout(DEADLINE_S)
        self._lines = opened.enter_context(self._stream.makefile("r"))

    def tell(self, *words: object) -> None:
        self._stream.sendall(" ".join(map(str, words)).encode() + b"\n")

    def answer(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise EOFError("the guest has ended its stream")
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        self.tell(*words)
        return self.answer()

    def expect(self, wanted: str, *words: object) -> None:
        answer = self.ask(*words)
        assert answer == wanted, answer


def make_sources(folder: Path, opened: ExitStack) -> tuple[Path, Path]:
    """A directory to write to, and one to read with a mount of its own below it."""
    live, fixed = folder / "live", folder / "fixed"
    live.mkdir()
    (fixed / "below").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", fixed / "below"], check=True)
    opened.callback(subprocess.run, ["umount", fixed / "below"], check=True)
    (live / "big").write_bytes(os.urandom(BIG_BYTES))
    (live / "hello").write_text("hello from the host")
    (fixed / "below/hello").write_text("hello below")
    return live, fixed


def drive(guest: Guest, share: Share, live: Path, fixed: Path, result: dict[str, Any]) -> None:
    numbers = (
        share.add(os.fspath(live), read_only=False),
        share.add(os.fspath(fixed), read_only=True),
    )
    result["look"] = guest.ask("look", *numbers)
    result["big"] = digest(live / "big")
    result["answer"] = digest(live / "answer")
    owned = os.stat(live / "owned")
    result["owned"] = [owned.st_uid, owned.st_gid, owned.st_mode & 0o7777]
    result["fixed_has"] = sorted(os.listdir(fixed) + os.listdir(fixed / "below"))
    guest.expect("read", "change", numbers[0])
    (live / "hello").write_text("changed while the guest had it cached")
    result["change"] = guest.ask("changed")
    late = share.add(os.fspath(live), read_only=True)
    result["late"] = guest.ask("late", late)
    share.remove(late)
    end = time.monotonic() + DEADLINE_S
    # The guest's kernel believes in a name for a second.
    while (removed := guest.ask("missing", late)) == "found" and time.monotonic() < end:
        pass
    result["removed"] = removed
    result["file"] = guest.ask("file", share.add(os.fspath(live / "big"), read_only=True))


def kill_daemon(guest: Guest, share: Share, ends: queue.Queue[str], number: int) -> dict[str, Any]:
    server = share.helpers[1].pid
    guest.expect("open", "lose", number)
    os.kill(server, signal.SIGSTOP)
    guest.expect("waiting", "stopped")
    os.kill(server, signal.SIGKILL)
    told = time.monotonic()
    end = ends.get(timeout=DEADLINE_S)
    return {
        "guest": guest.ask("killed"),
        "end": end,
        "told_s": round(time.monotonic() - told, 2),
        "alive": guest.ask("alive", number),
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    kernel, base_image = sys.argv[1:3]
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        script = GUEST.read_bytes()
        (folder / "vda").write_bytes(script + b"\n" * (-len(script) % 4096))
        opens = [
            (kernel, os.O_RDONLY),
            (base_image, os.O_RDONLY),
            (folder / "vda", os.O_RDONLY),
            (folder / "console", os.O_RDWR | os.O_CREAT),
        ]
        fds = [os.open(name, flags | os.O_CLOEXEC) for name, flags in opens]
        for fd in fds:
            opened.callback(os.close, fd)
        live, fixed = make_sources(folder, opened)
        (folder / "state").mkdir()
        ends: queue.Queue[str] = queue.Queue()
        start = time.monotonic()
        share = Share(os.fspath(folder / "state"), ends.put)
        result: dict[str, Any] = {"share_s": round(time.monotonic() - start, 3)}
        opened.callback(share.close)
        config = MachineConfig(
            vcpu_count=1,
            memory_mib=256,
            kernel_descriptor=0,
            pmem=(PmemConfig(descriptor=1),),
            blk=(BlkConfig(descriptor=2, read_only=True),),
            fs=(FsConfig(descriptor=4, tag=TAG),),
            vsock=VsockConfig(guest_cid=3, listen_ports=(PORT,)),
            console_descriptor=3,
            command_line=COMMAND_LINE,
        )
        with share.take_connection() as connection:
            vmm = handle.spawn(config, [*fds, connection.fileno()], log_fd=sys.stderr.fileno())
        opened.callback(vmm.close)
        try:
            # A guest that fails ends its stream, so nothing here waits for ever.
            with ExitStack() as streams:
                guest = Guest(vmm, streams)
                drive(guest, share, live, fixed, result)
                result["lost"] = kill_daemon(guest, share, ends, 0)
            result["exit"] = vmm.wait_exit(DEADLINE_S)._asdict()
        finally:
            share.close()
            result["left"] = [p.pid for p in share.helpers if start_ticks(p.pid)]
            result["console"] = (folder / "console").read_text(errors="replace")[-4000:]
            sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
