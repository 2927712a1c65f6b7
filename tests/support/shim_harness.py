"""A shim in this process: its real ttrpc server on a socket, a fake guest, a fake containerd.

The client side is the shim's own ttrpc client, so every call crosses the wire twice.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fake_vmm
import pytest
from fake_share import FakeShare

from vmcell_protos import task
from vmcell_protos.errors import VmcellError
from vmcell_protos.events import ForwardRequest
from vmcell_protos.wellknown import Any as AnyMessage
from vmcell_protos.wellknown import Empty
from vmcell_protos.wire import Message
from vmcell_shim import guest, sandbox
from vmcell_shim.client import TtrpcClient
from vmcell_shim.dispatch import Dispatch
from vmcell_shim.events import EventPublisher
from vmcell_shim.journal import Journal
from vmcell_shim.registry import Registry
from vmcell_shim.server import TtrpcServer

M = TypeVar("M", bound=Message)
DEADLINE_S = 20.0


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Polls for a state of another process that has no descriptor to wait on."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {deadline_s} s"
        time.sleep(0.01)


def refused(code: str) -> object:
    """The call raises an error of that code."""
    return pytest.raises(VmcellError, check=lambda error: error.code == code)


class FakeContainerd:
    """The event service of containerd; `events` holds (topic, event type, event bytes)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.arrived = threading.Condition()
        self.events: list[tuple[str, str, bytes]] = []
        self._open()

    def _open(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        self._server = TtrpcServer(listener, self._handle, Journal("", "containerd"))
        self._thread = threading.Thread(target=self._server.serve, args=(60.0, lambda: True))
        self._thread.start()

    def _handle(self, service: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        assert (service, method) == ("containerd.services.events.ttrpc.v1.Events", "Forward")
        envelope = ForwardRequest.decode(payload).envelope
        assert envelope is not None
        assert envelope.event is not None
        row = (envelope.topic, envelope.event.type_url, envelope.event.value)
        with self.arrived:
            self.events.append(row)
            self.arrived.notify_all()
        return Empty().encode()

    def topics(self) -> list[str]:
        with self.arrived:
            return [topic.removeprefix("/tasks/") for topic, _, _ in self.events]

    def wait_topics(self, *expected: str) -> None:
        """Waits until exactly these topics have arrived, in this order."""
        with self.arrived:
            self.arrived.wait_for(lambda: len(self.events) >= len(expected), DEADLINE_S)
        assert self.topics() == list(expected)

    def close(self) -> None:
        self._server.stop()
        self._thread.join(DEADLINE_S)
        self._server.close()
        os.unlink(self.path)

    def restart(self) -> None:
        self._open()


class Shim:
    """One shim with its client."""

    def __init__(self, directory: Path, containerd: FakeContainerd) -> None:
        self.directory = directory
        self.containerd = containerd
        self.idle = threading.Event()
        self.journal = Journal("", "test")
        self.events = EventPublisher(
            namespace="test",
            ttrpc_address=containerd.path,
            grpc_address="",
            publish_binary="",
            journal=self.journal,
        )
        self.registry = Registry("test", self.events, self.journal)
        self.service = Dispatch(self.registry, self.idle.set)
        path = str(directory / "shim.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.server = TtrpcServer(listener, self.service.handle, self.journal)
        self._thread = threading.Thread(target=self.server.serve, args=(60.0, lambda: True))
        self._thread.start()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        self.client = TtrpcClient(sock, "the shim")

    def call(
        self,
        method: str,
        request: Message,
        answer: type[M],
        timeout_s: float = DEADLINE_S,
        version: int = 2,
    ) -> M:
        return self.client.call(
            f"containerd.task.v{version}.Task", method, request, answer, timeout_s
        )

    def bundle(self, args: list[str], container_id: str = "c1", **changes: Any) -> Path:
        """A bundle with a spec that runs `args`; `changes` replace top-level keys."""
        bundle = self.directory / f"bundle-{container_id}"
        bundle.mkdir(exist_ok=True)
        root = self.directory / "root"
        (root / "etc").mkdir(parents=True, exist_ok=True)
        spec: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "process": {"args": args, "cwd": "/", "env": []},
            "root": {"path": str(root)},
            "hostname": "box",
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        }
        spec.update(changes)
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    def fifo(self, name: str) -> str:
        path = self.directory / name
        if not path.exists():
            os.mkfifo(path)
        return str(path)

    def create(
        self,
        *args: str,
        container_id: str = "c1",
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        terminal: bool = False,
        timeout_s: float = DEADLINE_S,
        **changes: Any,
    ) -> int:
        request = task.CreateTaskRequest(
            id=container_id,
            bundle=str(self.bundle(list(args), container_id, **changes)),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
        )
        return self.call("Create", request, task.CreateTaskResponse, timeout_s).pid

    def start(self, exec_id: str = "", *, container_id: str = "c1") -> int:
        request = task.StartRequest(id=container_id, exec_id=exec_id)
        return self.call("Start", request, task.StartResponse).pid

    def wait(self, exec_id: str = "", *, container_id: str = "c1") -> int:
        request = task.WaitRequest(id=container_id, exec_id=exec_id)
        return self.call("Wait", request, task.WaitResponse).exit_status

    def state(self, exec_id: str = "", *, container_id: str = "c1") -> task.StateResponse:
        request = task.StateRequest(id=container_id, exec_id=exec_id)
        return self.call("State", request, task.StateResponse)

    def kill(
        self,
        signal: int = 9,
        exec_id: str = "",
        *,
        everyone: bool = False,
        container_id: str = "c1",
    ) -> None:
        request = task.KillRequest(id=container_id, exec_id=exec_id, signal=signal, all=everyone)
        self.call("Kill", request, Empty)

    def delete(self, exec_id: str = "", *, container_id: str = "c1") -> task.DeleteResponse:
        request = task.DeleteRequest(id=container_id, exec_id=exec_id)
        return self.call("Delete", request, task.DeleteResponse)

    def add_exec(self, exec_id: str, *args: str, stdin: str = "", stdout: str = "") -> None:
        spec = AnyMessage(value=json.dumps({"args": args, "cwd": "/"}).encode())
        request = task.ExecProcessRequest(
            id="c1", exec_id=exec_id, spec=spec, stdin=stdin, stdout=stdout
        )
        self.call("Exec", request, Empty)

    def record(self) -> dict[str, Any]:
        """What the fake guest was asked to create."""
        text = (self.directory / "record.json").read_text()
        record: dict[str, Any] = json.loads(text)
        return record

    def left_behind(self) -> list[str]:
        """Files of sandboxes that are still there; caches are not a sandbox's."""
        found = []
        for place in ("run", "cache/sandboxes"):
            for path in (self.directory / place).rglob("*"):
                if not path.is_dir():
                    found.append(str(path.relative_to(self.directory)))
        return found

    def close(self) -> None:
        for container in self.registry.containers():
            container.sandbox.close()
            for process in container.processes():
                process.stdio.close()
        self.client.close()
        self.server.stop()
        self._thread.join(DEADLINE_S)
        self.server.close()
        self.events.close()
        self.journal.close()


def write_settings(path: Path, *, boot_timeout_s: int = 20) -> Path:
    """A shim's configuration at `path`; all it names is beside, the guest's images are empty."""
    directory = path.parent
    for name in ("kernel", "base.erofs"):
        (directory / name).touch()
    path.write_text(
        f'kernel = "{directory}/kernel"\nbase_image = "{directory}/base.erofs"\n'
        f'state_dir = "{directory}/run"\ncache_dir = "{directory}/cache"\n'
        f'snapshot_dir = "{directory}/snapshots"\n'
        f"writable_mib = 64\nboot_timeout_s = {boot_timeout_s}\n"
    )
    return path


@contextmanager
def running_shim(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shim]:
    """A shim below `directory`, with the fake guest in the VMM's place."""
    monkeypatch.setenv("VMCELL_CONFIG", str(write_settings(directory / "config.toml")))
    monkeypatch.setenv("FAKE_RECORD", str(directory / "record.json"))
    monkeypatch.setattr(guest.handle, "spawn", fake_vmm.spawn)
    monkeypatch.setattr(sandbox, "Share", FakeShare)
    with shim_in(directory) as shim:
        yield shim


@contextmanager
def shim_in(directory: Path) -> Iterator[Shim]:
    """A shim with files of its own in `directory`, in the surroundings that running_shim made."""
    containerd = FakeContainerd(str(directory / "events.sock"))
    try:
        shim = Shim(directory, containerd)
        try:
            yield shim
        finally:
            shim.close()
    finally:
        containerd.close()
