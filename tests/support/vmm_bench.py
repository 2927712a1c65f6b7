"""VMM processes for payloads, with their console and log; nothing may be left of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from payload import elf, memory_file

from vmcell_runtime.config import MachineConfig
from vmcell_runtime.handle import SavedFiles, VmmHandle, launch

DEADLINE_S = 30


class Bench:
    """Launches payloads and remembers their console and log."""

    def __init__(self, resources: ExitStack, folder: Path) -> None:
        self._resources = resources
        self._console = folder / "console.log"
        self._log = folder / "vmm.log"
        self.console_fd = self._own(os.open(self._console, os.O_CREAT | os.O_WRONLY))
        self.log_fd = self._own(os.open(self._log, os.O_CREAT | os.O_WRONLY | os.O_APPEND))

    def launch(self, code: bytes, *more_fds: int, **fields: object) -> VmmHandle:
        """A running VMM; descriptor 0 is the kernel, 1 the console, `more_fds` follow."""
        return self._launch(code, more_fds, fields, None)

    def _launch(
        self,
        code: bytes,
        more_fds: Sequence[int],
        fields: dict[str, object],
        saved: SavedFiles | None,
    ) -> VmmHandle:
        config = MachineConfig(
            **{
                "vcpu_count": 1,
                "memory_mib": 64,
                "kernel_descriptor": 0,
                "console_descriptor": 1,
                **fields,  # type: ignore[arg-type]  # a test's own values
            }
        )
        kernel_fd = memory_file(elf(code))
        try:
            fds = [kernel_fd, self.console_fd, *more_fds]
            started = launch(config, fds, log_fd=self.log_fd, saved=saved)
        finally:
            os.close(kernel_fd)
        self._resources.callback(started.close)
        return started

    def save(self, vmm: VmmHandle, folder: Path, base: Path | None = None) -> Path:
        """A snapshot of a paused VMM: `memory` and `state` in `folder`."""
        folder.mkdir()
        if base is not None:
            shutil.copyfile(base / "memory", folder / "memory")
        with (folder / "memory").open("r+b" if base else "w+b") as memory:
            memory.truncate(64 << 20)
            with (folder / "state").open("wb") as state:
                vmm.save(memory.fileno(), state.fileno())
        return folder

    def restore(self, snapshot: Path, *more_fds: int, **fields: object) -> VmmHandle:
        """A paused VMM made from a snapshot; descriptors as for `launch`."""
        with (snapshot / "memory").open("rb") as memory, (snapshot / "state").open("rb") as state:
            state.read()  # wherever it was last read
            saved = SavedFiles(memory.fileno(), state.fileno())
            return self._launch(b"", more_fds, fields, saved)

    @property
    def console(self) -> bytes:
        return self._console.read_bytes()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_console(self, seen: Callable[[bytes], bool], start: int = 0) -> int:
        """Waits until `seen` is true of what came from byte `start` on; how long it all is then."""
        deadline = time.monotonic() + DEADLINE_S
        while not seen((console := self.console)[start:]):
            assert time.monotonic() < deadline, (console[-200:], self.log)
            time.sleep(0.005)
        return len(console)

    def _own(self, fd: int) -> int:
        self._resources.callback(os.close, fd)
        return fd


@contextmanager
def vmm_bench(folder: Path) -> Iterator[Bench]:
    """A bench, and the check that descriptors and children are as before."""
    before = descriptors()
    with ExitStack() as resources:
        yield Bench(resources, folder)
    assert descriptors() == before, "every descriptor was given back"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def processor_ticks(pid: int) -> int:
    """User and system time of a process, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def assemble(source: Path, folder: Path) -> bytes:
    """The code of an assembler file's text section."""
    name = folder / source.stem
    subprocess.run(["as", "-o", f"{name}.o", source], check=True, timeout=60)
    copy = ["objcopy", "-O", "binary", "-j", ".text", f"{name}.o", f"{name}.bin"]
    subprocess.run(copy, check=True, timeout=60)
    return Path(f"{name}.bin").read_bytes()
