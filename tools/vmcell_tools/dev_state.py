"""Where a dev VM keeps its files on the host, and which processes are its own.

`<cache>/devvm/kernel/<version>/` is shared by all; `<runtime>/devvm/<name>/` belongs to one VM:
its sockets, keys, `console.log`, `state.json`, and `out/`, which the VM sees as /mnt/out.
Only one command at a time changes a VM: `locked` holds its lock.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.file_lock import lock
from vmcell_tools.build_cache import BuildCache

# sun_path holds 108 bytes; OpenSSH appends a random suffix of 17 to its control path.
SOCKET_PATH_LIMIT_BYTES = 108 - 18
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/vmcell/devvm`: kernels and stores, kept between VMs."""
    return BuildCache.default().root / "devvm"


def state_directory(name: str) -> Path:
    """The directory of the dev VM `name`, under $XDG_RUNTIME_DIR or else the cache."""
    if not NAME_PATTERN.fullmatch(name):
        raise CallerError(
            f"dev VM name {name!r} must be 1 to 32 of a-z, 0-9 and '-' and not begin with '-'"
        )
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "vmcell" / "devvm" if runtime else cache_directory() / "vm"
    directory = base / name
    if len(os.fsencode(directory / "root.sock")) > SOCKET_PATH_LIMIT_BYTES:
        raise CallerError(
            f"state directory {directory} is too long for a socket; set XDG_RUNTIME_DIR to a"
            " shorter path"
        )
    return directory


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same number.

    `start_ticks` is field 22 of /proc/pid/stat (proc(5)), clock ticks since the host's boot.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        ticks = _start_ticks(pid)
        if ticks is None:
            raise HostError(f"process {pid} ended before it could be recorded; see its log")
        return cls(pid=pid, start_ticks=ticks)

    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.start_ticks

    def end(self, *, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s`; returns when the process is gone."""
        for signal_number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            if not self.alive():
                return
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)
            deadline = time.monotonic() + wait_s
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.02)
        if self.alive():
            raise HostError(f"process {self.pid} did not end after SIGKILL; look for it in ps")


def _start_ticks(pid: int) -> int | None:
    """Field 22, or None for a process that is gone or only waits to be reaped.

    The first thread of a process that is ending is a zombie before the others have ended, and until
    then its files are open and locked.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        thread_count = len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" and thread_count < 2 else int(fields[19])


@dataclass(frozen=True, kw_only=True)
class DevVm:
    """A started dev VM as `state.json` records it; ports are on 127.0.0.1."""

    name: str
    directory: Path
    qemu: ProcessId
    helpers: tuple[ProcessId, ...]
    ssh_port: int
    api_port: int
    data_port: int
    memory_mib: int
    accelerator: str
    ready: bool
    has_store: bool = True

    @property
    def out_directory(self) -> Path:
        return self.directory / "out"

    @property
    def console_log(self) -> Path:
        return self.directory / "out" / "console.log"

    def save(self) -> None:
        """Replace state.json in one step."""
        record = asdict(self) | {"directory": str(self.directory)}
        path = self.directory / "state.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(record, indent=1) + "\n")
        fresh.replace(path)


def load(name: str) -> DevVm | None:
    """The recorded VM, alive or not; None when there is no record.

    Raises HostError for a record of another version or a damaged one; `vmcell dev down` copes.
    """
    directory = state_directory(name)
    try:
        record = json.loads((directory / "state.json").read_text())
        return DevVm(
            **record
            | {
                "directory": directory,
                "qemu": ProcessId(**record["qemu"]),
                "helpers": tuple(ProcessId(**helper) for helper in record["helpers"]),
            }
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise HostError(
            f"{directory}/state.json is damaged or of another version ({error}); run:"
            f" vmcell dev down --name {name}"
        ) from error


def recorded_processes(name: str) -> list[ProcessId]:
    """QEMU first, then its helpers, also from a record that `load` refuses."""
    path = state_directory(name) / "state.json"
    try:
        record = json.loads(path.read_text())
        return [ProcessId(**row) for row in (record["qemu"], *record["helpers"])]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise HostError(
            f"{path} names no processes ({error}); end qemu-system-x86_64 -name vmcell-dev-{name}"
            " by hand and delete the file"
        ) from error


@contextmanager
def locked(name: str, *, wait_s: float) -> Iterator[Path]:
    """Hold the lock of dev VM `name`; yields its directory, made with mode 0700."""
    directory = state_directory(name)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"cannot use the dev VM's directory {directory}: {error.strerror}; run it as its owner,"
            " or set XDG_RUNTIME_DIR to a directory of yours"
        ) from error
    try:
        try:
            lock(descriptor, timeout_s=wait_s)
        except HostError as error:
            raise HostError(
                f"another command has been working on dev VM {name!r} for {wait_s:.0f} s;"
                " wait for it or end it"
            ) from error
        yield directory
    finally:
        os.close(descriptor)
