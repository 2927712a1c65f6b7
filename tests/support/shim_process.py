"""The test's side of `shim_program`: starts one, calls it as containerd does, looks at it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TypeVar

from shim_harness import FakeContainerd, wait_until, write_settings

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_protos.wellknown import Any, Empty
from vmcell_protos.wire import Message
from vmcell_shim.client import TtrpcClient

M = TypeVar("M", bound=Message)
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("shim_program.py")
BOOT_S = 2


class ShimProcess:
    """One shim with one container `c1`; `agent` is the program in its VMM's place."""

    def __init__(self, directory: Path, agent: str, behaviour: dict[str, object]) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        write_settings(directory / "config.toml", boot_timeout_s=BOOT_S)
        self.containerd = FakeContainerd(str(directory / "events.sock"))
        roots = [ROOT / name for name in ("protos", "runtime", "shim", "tests/support")]
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(directory)],
            env={
                **os.environ,
                "PYTHONPATH": ":".join(map(str, roots)),
                "FAKE_AGENT": agent,
                "FAKE_BEHAVIOUR": json.dumps(behaviour),
            },
        )
        address = directory / "shim.sock"
        wait_until(address.exists, "the shim's socket")
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(address))
        self.client = TtrpcClient(sock, "the shim")
        self._drains: list[int] = []

    def call(
        self, method: str, request: Message, answer: type[M] = Empty, timeout_s: float = 20.0
    ) -> M:  # type: ignore[assignment]  # Empty is a Message
        return self.client.call("containerd.task.v2.Task", method, request, answer, timeout_s)

    def try_call(
        self, method: str, request: Message, answer: type[Message] = Empty, timeout_s: float = 1.0
    ) -> VmcellError | None:
        """The error that came, or None."""
        try:
            self.call(method, request, answer, timeout_s)
        except VmcellError as error:
            return error
        return None

    def create_request(self) -> task.CreateTaskRequest:
        bundle = self.directory / "bundle"
        root = self.directory / "root"
        bundle.mkdir(exist_ok=True)
        root.mkdir(exist_ok=True)
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": ["sleep", "600"], "cwd": "/", "env": []},
            "root": {"path": str(root)},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        }
        (bundle / "config.json").write_text(json.dumps(spec))
        return task.CreateTaskRequest(
            id="c1", bundle=str(bundle), stdout=self.drain("out"), stderr=self.drain("err")
        )

    def drain(self, name: str) -> str:
        """A FIFO whose reader takes everything and keeps nothing."""
        path = str(self.directory / name)
        os.mkfifo(path)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

        def read() -> None:
            while os.read(fd, 1 << 16) != b"over":
                pass
            os.close(fd)

        threading.Thread(target=read, daemon=True).start()
        self._drains.append(fd)
        return path

    def exec_request(self, exec_id: str) -> task.ExecProcessRequest:
        spec = Any(value=json.dumps({"args": ["true"], "cwd": "/"}).encode())
        return task.ExecProcessRequest(id="c1", exec_id=exec_id, spec=spec)

    def alive(self) -> bool:
        """It answers."""
        self.call("Connect", task.ConnectRequest(id="c1"), task.ConnectResponse)
        return self.process.poll() is None

    def resident_kib(self, row: str = "VmRSS") -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{row}:")[1].split()[0])

    def log(self) -> str:
        return (self.directory / "shim.log").read_bytes().decode()

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.containerd.close()


def seconds_of(action: object) -> float:
    """How long a call takes."""
    assert callable(action)
    began = time.monotonic()
    action()
    return time.monotonic() - began
