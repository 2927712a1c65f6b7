"""A guest's agent on this host, as a program: speaks agent.proto, runs real host processes.

Started by `fake_vmm` in place of a VMM; killing it is what killing a VMM is. Standard streams are
handed to the processes as they are. `behaviour` (JSON) makes it misbehave:
  "console": text written to the console log at once
  "silent": methods that are never answered
  "deny": methods that are answered with an error
  "hang_up": method at which it closes the control connection and lives on
  "exit_status": what WaitProcess says instead of the truth
  "oom": every exit was the OOM killer's
  "restored": what a fake that was saved had as its container
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from vmcell_protos import agent
from vmcell_protos.errors import CallerError, VmcellError
from vmcell_protos.ttrpc import Call, ServerConnection
from vmcell_protos.wellknown import Empty
from vmcell_protos.wire import Message

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Process:
    """One process of the one container."""

    def __init__(self, description: dict[str, object], streams: agent.Streams) -> None:
        self.description = description
        self.streams = streams
        self.popen: subprocess.Popen[bytes] | None = None
        self.failed = False
        self.terminal = -1
        self.copies: list[threading.Thread] = []


class FakeAgent:
    """Serves one control connection until its end."""

    def __init__(
        self, control: socket.socket, listener: socket.socket, behaviour: dict[str, object]
    ) -> None:
        self.control = control
        self.behaviour = behaviour
        self.sending = threading.Lock()
        self.streams: dict[int, socket.socket] = {}
        self.dialled = threading.Condition()
        self.processes: dict[tuple[str, str], Process] = {}
        self.attached: set[int] = set()
        self.oom_kills = 0
        self.oom = threading.Condition()
        self.spawning: queue.Queue[Any] = queue.Queue()
        self.listener = listener
        threading.Thread(target=self.accept_streams, daemon=True).start()

    def accept_streams(self) -> None:
        while True:
            stream, _ = self.listener.accept()
            name = b""
            while len(name) < 8:
                name += stream.recv(8 - len(name))
            with self.dialled:
                self.streams[int.from_bytes(name, "little")] = stream
                self.dialled.notify_all()

    def serve(self) -> None:
        protocol = ServerConnection()
        while data := self.control.recv(1 << 16):
            calls, answers = protocol.receive(data)
            self.control.sendall(answers)
            for call in calls:
                threading.Thread(target=self.answer, args=(protocol, call), daemon=True).start()
        if not self.behaviour.get("hang_up"):
            self.spawning.put(None)

    def answer(self, protocol: ServerConnection, call: Call) -> None:
        if call.method == self.behaviour.get("hang_up"):
            self.control.shutdown(socket.SHUT_RDWR)
            return
        silent = self.behaviour.get("silent", [])
        assert isinstance(silent, list)
        if call.method in silent:
            return
        denied = self.behaviour.get("deny", [])
        assert isinstance(denied, list)
        try:
            if call.method in denied:
                raise CallerError(f"no {call.method} for you", code="internal")
            payload = self.act(call.method, call.payload).encode()
            data = protocol.respond(call.stream_id, payload)
        except VmcellError as error:
            data = protocol.fail(call.stream_id, error.code, str(error))
        with self.sending:
            self.control.sendall(data)
        if call.method == "Shutdown":
            os._exit(0)

    def act(self, method: str, payload: bytes) -> Message:
        handlers: dict[str, Callable[[bytes], Message]] = {
            "Hello": lambda _: agent.HelloResponse(
                agent_version="fake", kernel_release="6.12-fake"
            ),
            "ConfigureGuest": lambda _: Empty(),
            "CreateContainer": self.create,
            "AddProcess": self.add,
            "StartProcess": self.start,
            "WaitProcess": self.wait,
            "SignalProcess": self.signal,
            "ResizePty": self.resize,
            "ContainerStats": self.stats,
            "AttachDevice": self.attach,
            "DetachDevice": self.detach,
            "UpdateContainer": self.update,
            "FreezeContainer": lambda payload: self.freeze(payload, frozen=True),
            "ThawContainer": lambda payload: self.freeze(payload, frozen=False),
            "WaitOom": self.wait_oom,
            "PrepareSnapshot": lambda _: self.stand_still(signal.SIGSTOP),
            "AdoptContainer": self.adopt,
            "ResumeGuest": self.resume,
            "CopyFiles": lambda _: Empty(),
            "DeleteProcess": self.delete,
            "Shutdown": lambda _: Empty(),
        }
        return handlers[method](payload)

    def create(self, payload: bytes) -> Message:
        request = agent.CreateContainerRequest.decode(payload)
        spec = json.loads(request.spec_json)
        assert request.rootfs is not None
        record = {
            "spec": spec,
            "files": [copy.destination for copy in request.files],
            "init": request.init,
            "lower_devices": request.rootfs.lower_devices,
            "upper_device": request.rootfs.upper_device,
            "shared_namespaces": request.shared_namespaces,
        }
        with open(os.environ["FAKE_RECORD"], "w") as file:
            json.dump(record, file)
        assert request.streams is not None
        self.own(request.container_id, spec.get("process", {}), request.streams)
        return Empty()

    def own(self, container_id: str, description: dict[str, object], streams: Any) -> None:
        """The one container, noted beside the listener for whoever saves this fake."""
        self.processes[container_id, ""] = Process(description, streams)
        directory = os.path.dirname(self.listener.getsockname())
        with open(os.path.join(directory, "container.json"), "w") as file:
            json.dump({"container_id": container_id, "process": description}, file)

    def stand_still(self, number: int) -> Message:
        for container_id in {owner for owner, _ in self.processes}:
            self.signal_all(container_id, number)
        return Empty()

    def adopt(self, payload: bytes) -> Message:
        request = agent.AdoptContainerRequest.decode(payload)
        restored = self.behaviour["restored"]
        assert isinstance(restored, dict)
        assert restored["container_id"] == request.container_id
        self.own(request.new_container_id, restored["process"], request.streams)
        return agent.AdoptContainerResponse(guest_pid=1, running=True)

    def resume(self, payload: bytes) -> Message:
        request = agent.ResumeGuestRequest.decode(payload)
        assert request.guest is not None
        assert abs(request.guest.unix_time_ns - time.time_ns()) < 60e9
        for (container_id, exec_id), process in list(self.processes.items()):
            if "restored" in self.behaviour and process.popen is None and not exec_id:
                assert len(request.machine_id) == 16
                self.start(agent.ProcessRef(container_id=container_id).encode())
        return self.stand_still(signal.SIGCONT)

    def attach(self, payload: bytes) -> Message:
        window = agent.AttachDeviceRequest.decode(payload).window
        self.attached.add(window)
        return agent.AttachDeviceResponse(name=f"dev{window}")

    def detach(self, payload: bytes) -> Message:
        self.attached.remove(agent.DetachDeviceRequest.decode(payload).window)
        return Empty()

    def update(self, payload: bytes) -> Message:
        request = agent.UpdateContainerRequest.decode(payload)
        self.find(request.container_id, "")
        json.loads(request.resources_json)
        return Empty()

    def freeze(self, payload: bytes, *, frozen: bool) -> Message:
        container_id = agent.ContainerRef.decode(payload).container_id
        popen = self.find(container_id, "").popen
        assert popen is not None
        popen.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)
        return Empty()

    def wait_oom(self, payload: bytes) -> Message:
        request = agent.WaitOomRequest.decode(payload)
        with self.oom:
            gone = (request.container_id, "")
            self.oom.wait_for(lambda: self.oom_kills > request.seen or gone not in self.processes)
            if gone not in self.processes:
                raise CallerError("the container is gone", code="not_found")
            return agent.WaitOomResponse(oom_kills=self.oom_kills)

    def add(self, payload: bytes) -> Message:
        request = agent.AddProcessRequest.decode(payload)
        assert request.streams is not None
        key = (request.container_id, request.exec_id)
        self.processes[key] = Process(json.loads(request.process_json), request.streams)
        return Empty()

    def find(self, container_id: str, exec_id: str) -> Process:
        if (container_id, exec_id) not in self.processes:
            raise CallerError(f"process {exec_id!r} is not known", code="not_found")
        return self.processes[container_id, exec_id]

    def referred(self, payload: bytes) -> Process:
        ref = agent.ProcessRef.decode(payload)
        return self.find(ref.container_id, ref.exec_id)

    def stream(self, stream_id: int) -> socket.socket:
        with self.dialled:
            if not self.dialled.wait_for(lambda: stream_id in self.streams, 10):
                raise CallerError(f"stream {stream_id} was not dialled", code="deadline_exceeded")
            return self.streams.pop(stream_id)

    def start(self, payload: bytes) -> Message:
        process = self.referred(payload)
        if process.failed:
            raise CallerError("it can be started once", code="failed_precondition")
        streams = process.streams
        args = process.description["args"]
        assert isinstance(args, list)
        if streams.terminal:
            return self.start_on_terminal(process, args)
        ids = {"stdin": streams.stdin, "stdout": streams.stdout, "stderr": streams.stderr}
        sockets = {name: self.stream(number) for name, number in ids.items() if number}
        try:
            process.popen = self.spawn(
                args, *(sockets.get(name, subprocess.DEVNULL) for name in ids)
            )
        except OSError as error:
            process.failed = True
            raise CallerError(f"cannot run {args[0]}: {error.strerror}") from error
        finally:
            for stream in sockets.values():
                stream.close()
        return agent.StartProcessResponse(guest_pid=process.popen.pid)

    def spawn(self, args: list[str], *files: int | socket.socket) -> subprocess.Popen[bytes]:
        """In the main thread: PR_SET_PDEATHSIG means the death of the forking thread."""
        made: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()
        self.spawning.put((args, files, made))
        popen = made.get()
        if isinstance(popen, OSError):
            raise popen
        return popen

    def spawn_for_ever(self) -> None:
        while (job := self.spawning.get()) is not None:
            args, files, made = job
            try:
                popen = subprocess.Popen(
                    args,
                    stdin=files[0],
                    stdout=files[1],
                    stderr=files[2],
                    start_new_session=True,
                    preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, 9),
                )
            except OSError as error:
                made.put(error)
            else:
                made.put(popen)

    def start_on_terminal(self, process: Process, args: list[str]) -> Message:
        stream = self.stream(process.streams.stdout)
        process.terminal, inner = pty.openpty()
        process.popen = self.spawn(args, inner, inner, inner)
        os.close(inner)
        # The process may be over at once: each thread has a socket of its own from the beginning.
        backwards = stream.dup()
        outwards = threading.Thread(target=self.copy_out, args=(process.terminal, stream))
        process.copies.append(outwards)
        outwards.start()
        threading.Thread(
            target=self.copy_in, args=(backwards, process.terminal), daemon=True
        ).start()
        return agent.StartProcessResponse(guest_pid=process.popen.pid)

    def copy_out(self, terminal: int, stream: socket.socket) -> None:
        try:
            while data := os.read(terminal, 4096):
                stream.sendall(data)
        except OSError:
            pass
        stream.shutdown(socket.SHUT_WR)
        stream.close()

    def copy_in(self, stream: socket.socket, terminal: int) -> None:
        while data := stream.recv(4096):
            os.write(terminal, data)

    def wait(self, payload: bytes) -> Message:
        ref = agent.ProcessRef.decode(payload)
        exec_id = ref.exec_id
        process = self.find(ref.container_id, exec_id)
        assert process.popen is not None
        code = process.popen.wait()
        if not exec_id:
            # The end of a pid namespace's init is the end of all in it.
            self.signal_all(ref.container_id, signal.SIGKILL)
        for thread in process.copies:
            thread.join()
        status = self.behaviour.get("exit_status", code if code >= 0 else 128 - code)
        assert isinstance(status, int)
        if self.behaviour.get("oom"):
            self.oom_kills += 1
        return agent.WaitProcessResponse(
            exit_status=status, exited_at_unix_ns=1, oom_kills=self.oom_kills
        )

    def signal(self, payload: bytes) -> Message:
        request = agent.SignalProcessRequest.decode(payload)
        process = self.find(request.container_id, request.exec_id)
        if process.popen is None or process.popen.poll() is not None:
            raise CallerError("the process has ended", code="not_found")
        if request.all:
            self.signal_all(request.container_id, request.signal)
        else:
            process.popen.send_signal(request.signal)
        return Empty()

    def signal_all(self, container_id: str, number: int) -> None:
        for (owner, _), process in list(self.processes.items()):
            if owner == container_id and process.popen is not None and process.popen.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.popen.pid, number)

    def resize(self, payload: bytes) -> Message:
        request = agent.ResizePtyRequest.decode(payload)
        size = request.rows.to_bytes(2, "little") + request.columns.to_bytes(2, "little") + bytes(4)
        import fcntl
        import termios

        process = self.find(request.container_id, request.exec_id)
        if process.terminal < 0:
            raise CallerError("it has no terminal to resize", code="failed_precondition")
        fcntl.ioctl(process.terminal, termios.TIOCSWINSZ, size)
        return Empty()

    def stats(self, payload: bytes) -> Message:
        return agent.ContainerStatsResponse(
            cpu={"usage_usec": 5000, "user_usec": 3000, "unknown": 1},
            memory={"anon": 4096, "inactive_file": 8192},
            memory_usage_bytes=65536,
            pids_current=len(self.processes),
        )

    def delete(self, payload: bytes) -> Message:
        ref = agent.ProcessRef.decode(payload)
        self.find(ref.container_id, ref.exec_id)
        with self.oom:
            del self.processes[ref.container_id, ref.exec_id]
            self.oom.notify_all()
        return Empty()


def main() -> None:
    """argv: the control socket's descriptor, the listener's descriptor, the behaviour."""
    behaviour = json.loads(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    fake = FakeAgent(control, socket.socket(fileno=int(sys.argv[2])), behaviour)
    threading.Thread(target=fake.serve, daemon=True).start()
    fake.spawn_for_ever()


if __name__ == "__main__":
    main()
