"""QEMU's machine `microvm` as a peer: booted, saved and restored with the same hand-made guest.

It has what it has of our devices: three virtio-blk disks in the place of two images and a disk, an
entropy source and a balloon; no vsock (that is vhost's, which hosts may lack) and no network.
QEMU starts guests at the 32-bit entry of PVH, where TALK's bytes mean the same.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.bench.payload import TALK, pvh_elf
from vmcell_tools.dev_qemu import QEMU

DEADLINE_S = 20.0
DEVICES = "3 virtio-blk, rng, balloon"


def missing_microvm() -> str:
    """Why there is no such peer on this host; "" when there is."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed"
    done = subprocess.run([QEMU, "-M", "help"], capture_output=True, text=True, check=False)
    has_it = any(line.split()[:1] == ["microvm"] for line in done.stdout.splitlines())
    return "" if has_it else f"{QEMU} has no machine microvm"


class QemuMicrovm:
    """One machine and its saved state, and QEMUs made of either; all files are in `folder`."""

    def __init__(self, folder: Path, memory_mib: int, disks: Sequence[Path]) -> None:
        self._folder = folder
        self._memory_mib = memory_mib
        self._disks = disks
        self._kernel = folder / "payload.pvh"
        self._kernel.write_bytes(pvh_elf(TALK))
        self._state = folder / "qemu.state"
        self._log = folder / "qemu.log"

    def boot(self) -> tuple[float]:
        """Milliseconds from the start of QEMU to the guest's first instruction."""
        return (self._first_byte_ms([]),)

    def restore(self) -> tuple[float]:
        """The same for what `save` has saved."""
        return (self._first_byte_ms(["-incoming", f"exec:cat {self._state}"]),)

    def save(self) -> None:
        """Makes what `restore` restores. Raises HostError, TimeoutError."""
        path = self._folder / "qmp"
        with self._running(["-qmp", f"unix:{path},server=on,wait=off"]) as console:
            self._wait(console)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(DEADLINE_S)
                sock.connect(str(path))
                with sock.makefile("rw") as stream:
                    stream.readline()  # its greeting
                    _qmp(stream, "qmp_capabilities")
                    _qmp(stream, "migrate", uri=f"exec:cat > {self._state}")
                    _wait_saved(stream)

    def _first_byte_ms(self, more: list[str]) -> float:
        began = time.perf_counter_ns()
        with self._running(more) as console:
            self._wait(console)
            return (time.perf_counter_ns() - began) / 1e6

    @contextmanager
    def _running(self, more: list[str]) -> Iterator[int]:
        """The read end of its console."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*self._command(), *more],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert process.stdout is not None
        try:
            with process.stdout:
                yield process.stdout.fileno()
        finally:
            process.kill()
            process.wait(DEADLINE_S)

    def _command(self) -> list[str]:
        command = [
            *(QEMU, "-M", "microvm", "-accel", "kvm", "-cpu", "host,-arch-capabilities"),
            *("-m", str(self._memory_mib), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-kernel", str(self._kernel), "-serial", "stdio"),
            *("-device", "virtio-rng-device", "-device", "virtio-balloon-device"),
        ]
        for number, path in enumerate(self._disks):
            drive = f"file={path},if=none,id=d{number},format=raw,read-only=on"
            command += ["-drive", drive, "-device", f"virtio-blk-device,drive=d{number}"]
        return command

    def _wait(self, console: int) -> None:
        readable, _, _ = select.select([console], [], [], DEADLINE_S)
        if not readable:
            raise TimeoutError(f"QEMU's guest said nothing within {DEADLINE_S:g} s")
        if not os.read(console, 1):
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise HostError(f"QEMU ended: {' '.join(last)}")


def _qmp(stream, execute: str, **arguments: str) -> dict[str, object]:  # type: ignore[no-untyped-def]  # a text stream for both ways
    """The answer to one command; events before it are dropped. HostError for an error."""
    stream.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
    stream.flush()
    while line := stream.readline():
        answer = json.loads(line)
        if "error" in answer:
            raise HostError(f"QEMU refuses {execute}: {answer['error']}")
        if "return" in answer:
            return dict(answer["return"])
    raise HostError(f"QEMU ended at {execute}")


def _wait_saved(stream) -> None:  # type: ignore[no-untyped-def]  # as above
    deadline = time.monotonic() + DEADLINE_S
    while True:
        status = _qmp(stream, "query-migrate").get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled") or time.monotonic() > deadline:
            raise HostError(f"QEMU's guest could not be saved: {status}")
        time.sleep(0.02)  # QEMU tells of it by events only when asked to beforehand
