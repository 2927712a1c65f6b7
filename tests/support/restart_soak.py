"""Containers made, used and killed while containerd is killed (-9) and started again at random.

usage: restart_soak.py SETTINGS (JSON: see Settings); prints a Report as JSON.

The FIFOs of the execs are this program's own, so that every byte of their output is accounted for.
One exec of each cycle ends while no daemon is there: its exit has to be known afterwards.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stubborn_containerd import StubbornContainerd

LINE_BYTES = 1000
STREAM_DEADLINE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`daemon`: containerd's whole command line, by which the running one is found; `directory`:
    for FIFOs. Between two kills `shortest_s` to `longest_s` pass. `lines` of LINE_BYTES are what
    each exec writes, `line_s` apart."""

    socket: str
    daemon: list[str]
    log: str
    directory: str
    image: str
    runtime: str
    namespace: str = "default"
    snapshotter: str = "overlayfs"
    cycles: int = 10
    at_once: int = 2
    seed: int = 1
    shortest_s: float = 2.0
    longest_s: float = 8.0
    lines: int = 60
    line_s: float = 0.05


@dataclass(kw_only=True)
class Report:
    """What happened; `failures` is empty when all was as it should be."""

    cycles: int = 0
    restarts: int = 0
    exits_in_a_gap: int = 0
    bytes_read: int = 0
    repeated_calls: int = 0
    failures: list[str] = field(default_factory=list)


class Daemon:
    """containerd, killed and started again; whoever started it first."""

    def __init__(self, settings: Settings) -> None:
        self._command = settings.daemon
        self._log = settings.log
        self._child: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        line = b"\0".join(word.encode() for word in self._command) + b"\0"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _command_line(entry) == line:
                pidfd = os.pidfd_open(int(entry.name))
                os.kill(int(entry.name), signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                assert poll.poll(60_000), "containerd outlives SIGKILL"
                os.close(pidfd)
        if self._child is not None:
            self._child.wait(60)

    def start(self) -> None:
        """A new one, in a session of its own; it outlives this program."""
        with open(self._log, "ab") as log:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=True,
                start_new_session=True,
            )  # fmt: skip


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


class Output:
    """A reader of one FIFO. One that is `restless` closes it now and then and comes back."""

    def __init__(self, path: Path, *, restless: bool) -> None:
        self.path = path
        os.mkfifo(path)
        self.data = bytearray()
        self._restless = restless
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        while not self._read_some(fd):
            time.sleep(0.1)
            # The writer may have ended meanwhile: a blocking open would wait for the next one.
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(fd, True)

    def _read_some(self, fd: int) -> bool:
        """True at the end, False when it is time to leave for a moment."""
        taken = 0
        with open(fd, "rb", buffering=0) as file:
            while chunk := file.read(LINE_BYTES):
                self.data += chunk
                taken += 1
                if self._restless and taken == 10:
                    return False
        return True

    def to_end(self) -> bytes:
        self._thread.join(STREAM_DEADLINE_S)
        assert not self._thread.is_alive(), f"{self.path} has no end after {len(self.data)} bytes"
        self.path.unlink()
        return bytes(self.data)


class Gaps:
    """Execs that wait for a moment without a daemon to end in."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Path, threading.Event]] = deque()
        self.count = 0

    def join(self, stdin: Path) -> threading.Event:
        """The event is set when the exec behind `stdin` has been told to end."""
        told = threading.Event()
        self._waiting.append((stdin, told))
        return told

    def use(self) -> None:
        """Called while there is no daemon."""
        while self._waiting:
            stdin, told = self._waiting.popleft()
            stdin.write_bytes(b"go\n")
            self.count += 1
            told.set()


class Soak:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.daemon = Daemon(settings)
        self.report = Report()
        self.gaps = Gaps()
        self.client = StubbornContainerd(
            settings.socket,
            namespace=settings.namespace,
            snapshotter=settings.snapshotter,
            runtime=settings.runtime,
        )
        self.chain_id = self.client.chain_id(settings.image)
        self._done = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> Report:
        """All cycles; afterwards a daemon runs that answers."""
        killing = threading.Thread(target=self._guarded(self._kill_daemons))
        killing.start()
        with ThreadPoolExecutor(self.settings.at_once) as pool:
            for number in range(self.settings.cycles):
                pool.submit(self._guarded(lambda number=number: self._cycle(number)))
        self._done.set()
        killing.join()
        self.report.exits_in_a_gap = self.gaps.count
        self.report.repeated_calls = self.client.repeated
        self.client.close()
        return self.report

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except Exception:  # noqa: BLE001 # whatever it was: it is a failure of this cycle
                with self._lock:
                    self.report.failures.append(traceback.format_exc())

        return run

    def _kill_daemons(self) -> None:
        chance = random.Random(self.settings.seed)
        while True:
            self._done.wait(chance.uniform(self.settings.shortest_s, self.settings.longest_s))
            self.daemon.kill()
            self.gaps.use()
            time.sleep(chance.uniform(0.0, 1.5))
            self.daemon.start()
            self.client.version()
            self.report.restarts += 1
            if self._done.is_set():
                return

    def _cycle(self, number: int) -> None:
        name = f"soak-{number}"
        client, settings = self.client, self.settings
        client.make(name, chain_id=self.chain_id, image=settings.image, spec=container_spec(name))
        try:
            client.start(name)
            ended = self._exec_in_a_gap(name)
            execs = [self._exec_that_writes(name, key) for key in ("steady", "restless")]
            for check in (*execs, ended):
                check()
            client.kill(name)
            status = client.wait(name)
            assert status == 137, f"{name} ended with {status}"
        finally:
            client.remove(name)
        with self._lock:
            self.report.cycles += 1

    def _exec_that_writes(self, name: str, key: str) -> Callable[[], None]:
        output = Output(Path(self.settings.directory, f"{name}-{key}"), restless=key == "restless")
        lines, pause = self.settings.lines, self.settings.line_s
        width = LINE_BYTES - 1
        script = (
            f"i=0; while [ $i -lt {lines} ]; do printf '%0{width}d\\n' $i; i=$((i + 1)); "
            f"sleep {pause}; done; exit 3"
        )
        client = self.client
        client.add_exec(name, key, ["sh", "-c", script], stdout=str(output.path))
        client.start(name, key)

        def check() -> None:
            status = client.wait(name, key)
            client.delete_exec(name, key)
            data = output.to_end()
            assert status == 3, f"{name} {key} ended with {status}"
            expected = b"".join(b"%0*d\n" % (width, number) for number in range(lines))
            assert data == expected, f"{name} {key}: {len(data)} of {len(expected)} bytes"
            with self._lock:
                self.report.bytes_read += len(data)

        return check

    def _exec_in_a_gap(self, name: str) -> Callable[[], None]:
        stdin = Path(self.settings.directory, f"{name}-gap-in")
        os.mkfifo(stdin)
        output = Output(Path(self.settings.directory, f"{name}-gap"), restless=False)
        client = self.client
        script = "read -r line; echo $line; exit 5"
        client.add_exec(
            name, "gap", ["sh", "-c", script], stdin=str(stdin), stdout=str(output.path)
        )
        client.start(name, "gap")
        told = self.gaps.join(stdin)

        def check() -> None:
            assert told.wait(STREAM_DEADLINE_S), f"no gap for {name}"
            status = client.wait(name, "gap")
            client.delete_exec(name, "gap")
            stdin.unlink()
            assert (status, output.to_end()) == (5, b"go\n"), f"{name} gap"

        return check


KINDS = ("pid", "ipc", "uts", "mount", "network")


def container_spec(name: str) -> dict[str, object]:
    """An OCI spec for a shell's worth of tools that sleeps."""
    kinds = (("proc", "proc", []), ("sysfs", "sys", ["ro"]), ("tmpfs", "tmp", []))
    return {
        "ociVersion": "1.0.2",
        "process": {"args": ["sleep", "100000"], "cwd": "/", "env": ["PATH=/usr/bin:/bin"]},
        "root": {"path": "rootfs"},
        "hostname": name,
        "mounts": [
            {"destination": f"/{place}", "type": kind, "source": kind, "options": options}
            for kind, place, options in kinds
        ],
        "linux": {"namespaces": [{"type": kind} for kind in KINDS]},
    }


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    Path(settings.directory).mkdir(parents=True, exist_ok=True)
    json.dump(asdict(Soak(settings).run()), sys.stdout)


if __name__ == "__main__":
    main()
