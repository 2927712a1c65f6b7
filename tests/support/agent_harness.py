"""A real agent on this host: PID 1 of a pid and mount namespace, driven over unix sockets.

It runs the code a guest runs, from the control protocol to execve, with the transports a guest has
not: unix sockets instead of vsock, loop devices instead of pmem and virtio-blk. What would act on
this machine itself (the wall clock, the page cache) goes to files of the test's.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmcell_protos import agent as messages
from vmcell_protos.ttrpc import ClientConnection, Reply
from vmcell_protos.wire import Message

ROOT = Path(__file__).resolve().parents[2]
SERVICE = "vmcell.agent.v1.Agent"
DEADLINE_SECONDS = 30.0
UPPER_BYTES = 96 << 20
# One of its own, as PID 1 has -1000 in a guest (which takes a capability that tests may lack).
AGENT_OOM_SCORE = 300
ALL_CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"]
BUSYBOX = "/bin/busybox"

_DRIVER = """
import sys
sys.path[:0] = {path!r}
import os, socket, time
from vmcell_agent.guest import Places, Transports, serve
from vmcell_agent.__main__ import BUILTINS
from vmcell_agent import abi, control, liveshare, network, process, snapshot, syscalls
liveshare.mount = lambda place: syscalls.mount({share!r}, place, "", abi.MS_BIND | abi.MS_REC)
network.loopback_up()
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("{oom_score}")
process.DIAL_SECONDS = 2.0
control.DIAL_SECONDS = 3.0
snapshot.VM_DIRECTORY = {vm!r}
def clock_settime_ns(clock, unix_time_ns):
    with open({clock!r}, "w") as file:
        file.write(str(unix_time_ns))
time.clock_settime_ns = clock_settime_ns
def log(line):
    print(line, file=sys.stderr, flush=True)
    with open({log!r}, "a") as file:
        file.write(line + "\\n")
def dial():
    host = socket.socket(socket.AF_UNIX)
    host.setblocking(False)
    try:
        host.connect({host!r})
    except BlockingIOError:
        pass
    except OSError:
        host.close()
        raise
    return host
host = socket.socket(fileno={control})
streams = socket.socket(fileno={streams})
ports = socket.socket(fileno={ports})
places = Places({cgroup!r}, {state!r}, {devices!r}, {sysfs!r})
serve(Transports(host, dial, streams, ports, lambda address: True), places, BUILTINS,
      log)
"""


def run(*command: str) -> str:
    """The command's standard output; raises with its error output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def cgroup2_mount() -> str:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, fstype = line.split()[:3]
        if fstype == "cgroup2":
            return path
    raise RuntimeError("this machine has no cgroup2 mount; mount one on /sys/fs/cgroup/unified")


def make_busybox_tree(tree: Path) -> None:
    """A root file system of busybox and the usual directories."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root", "home/user", "var/lib"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, tree / "bin/busybox")
    for applet in run(BUSYBOX, "--list").split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "tmp").chmod(0o1777)
    (tree / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"
    )
    (tree / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")


def make_erofs(tree: Path, image: Path) -> Path:
    run("mkfs.erofs", "-E", "noinline_data", "--quiet", str(image), str(tree))
    return image


def process_spec(*args: str, **changes: Any) -> dict[str, Any]:
    """`process` of an OCI spec that runs `args` as root with a few capabilities."""
    process: dict[str, Any] = {
        "args": list(args),
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "capabilities": {
            name: list(ALL_CAPABILITIES) for name in ("bounding", "effective", "permitted")
        },
        "noNewPrivileges": True,
    }
    process.update(changes)
    return process


def container_spec(process: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What containerd writes for a plain container, in short."""
    spec: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "namespaces": [
                {"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                              "/proc/sysrq-trigger"],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }  # fmt: skip
    spec.update(changes)
    return spec


class AgentClient:
    """The host's side of the control protocol and of the streams. Every wait has a deadline."""

    def __init__(
        self,
        control: socket.socket,
        connect: Callable[[], socket.socket],
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """`connect` dials the agent's stream port."""
        self.deadline_seconds = deadline_seconds
        self._control = control
        self._connect = connect
        self._protocol = ClientConnection()
        self._replies: dict[int, Reply] = {}
        self._next_stream = 1

    def begin(self, method: str, request: Message) -> int:
        """Send a call; `finish` waits for its answer."""
        stream_id, data = self._protocol.call(SERVICE, method, request.encode())
        self._control.sendall(data)
        return stream_id

    def answered(self, stream_id: int, seconds: float = 0.0) -> bool:
        """Whether the answer has arrived, waiting at most `seconds`."""
        end = time.monotonic() + seconds
        while stream_id not in self._replies:
            ready, _, _ = select.select([self._control], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return False
            data = self._control.recv(1 << 20)
            if not data:
                raise ConnectionError("the agent closed the control connection")
            for reply in self._protocol.receive(data):
                self._replies[reply.stream_id] = reply
        return True

    def finish(self, stream_id: int) -> bytes:
        """The answer's payload; raises the agent's error."""
        if not self.answered(stream_id, self.deadline_seconds):
            raise TimeoutError(f"no answer to call {stream_id} in {self.deadline_seconds} s")
        reply = self._replies.pop(stream_id)
        if reply.error is not None:
            raise reply.error
        return reply.payload

    def call(self, method: str, request: Message) -> bytes:
        return self.finish(self.begin(method, request))

    def dial(self, stream_id: int) -> socket.socket:
        """Connect the stream `stream_id`."""
        connection = self.dial_unnamed()
        connection.sendall(struct.pack("<Q", stream_id))
        return connection

    def dial_unnamed(self) -> socket.socket:
        """A connection to the stream port that has not said which stream it is."""
        connection = self._connect()
        connection.settimeout(self.deadline_seconds)
        return connection

    def hang_up(self) -> None:
        """The agent sees an end of file; to close with answers unread would be a reset."""
        with suppress(OSError):  # the agent was first
            self._control.shutdown(socket.SHUT_WR)

    def be_reset(self, control: Callable[[], socket.socket]) -> None:
        """The connection breaks as a transport's reset breaks it; `control` gives the next one."""
        self._control.sendall(self._protocol.call(SERVICE, "Hello", b"")[1])
        select.select([self._control], [], [], self.deadline_seconds)  # unread when it is closed
        self._control.close()
        self._protocol = ClientConnection()
        self._replies.clear()
        self._control = control()

    def close(self) -> None:
        self._control.close()

    def new_stream(self) -> int:
        self._next_stream += 1
        return self._next_stream


class Running:
    """A process the agent has started, and the host's ends of its streams."""

    def __init__(
        self, client: AgentClient, container_id: str, exec_id: str, streams: messages.Streams
    ) -> None:
        self.client = client
        self.ref = messages.ProcessRef(container_id=container_id, exec_id=exec_id)
        self.streams = streams
        self.sockets: dict[str, socket.socket] = {}
        self.pid = 0

    def start(self) -> Running:
        for name in ("stdin", "stdout", "stderr"):
            if stream_id := getattr(self.streams, name):
                self.sockets[name] = self.client.dial(stream_id)
        payload = self.client.call("StartProcess", self.ref)
        self.pid = messages.StartProcessResponse.decode(payload).guest_pid
        return self

    def read(self, name: str = "stdout") -> bytes:
        """Everything up to the end of the stream."""
        parts = []
        while part := self.sockets[name].recv(1 << 16):
            parts.append(part)
        return b"".join(parts)

    def read_until(self, marker: bytes, name: str = "stdout") -> bytes:
        data = b""
        while marker not in data:
            part = self.sockets[name].recv(1 << 16)
            if not part:
                raise EOFError(f"stream ended before {marker!r}: {data!r}")
            data += part
        return data

    def become(self, command: str) -> Running:
        """Waits for the exec by which the process turns into that command line."""
        deadline = time.monotonic() + 10
        container = messages.ContainerRef(container_id=self.ref.container_id)
        while True:
            payload = self.client.call("ListProcesses", container)
            rows = messages.ListProcessesResponse.decode(payload).processes
            if any(row.guest_pid == self.pid and row.command == command for row in rows):
                return self
            assert time.monotonic() < deadline, rows

    def wait(self) -> int:
        payload = self.client.call("WaitProcess", self.ref)
        return messages.WaitProcessResponse.decode(payload).exit_status

    def signal(self, number: int, *, everyone: bool = False) -> None:
        self.client.call(
            "SignalProcess",
            messages.SignalProcessRequest(
                container_id=self.ref.container_id,
                exec_id=self.ref.exec_id,
                signal=number,
                all=everyone,
            ),
        )

    def delete(self) -> None:
        self.client.call("DeleteProcess", self.ref)

    def close(self) -> None:
        for connection in self.sockets.values():
            connection.close()


def _streams(client: AgentClient, *, terminal: bool, stdin: bool) -> messages.Streams:
    if terminal:
        return messages.Streams(stdout=client.new_stream(), terminal=True)
    return messages.Streams(
        stdin=client.new_stream() if stdin else 0,
        stdout=client.new_stream(),
        stderr=client.new_stream(),
    )


def create_container(
    client: AgentClient,
    container_id: str,
    spec: dict[str, Any],
    *,
    terminal: bool = False,
    stdin: bool = False,
    upper: str = "vda",
    files: list[messages.FileCopy] | None = None,
    init: str = "",
    rootfs: messages.Rootfs | None = None,
    shared: list[str] | None = None,
) -> Running:
    """Create a container on pmem1 or `rootfs`, sharing namespaces; not started yet."""
    streams = _streams(client, terminal=terminal, stdin=stdin)
    client.call(
        "CreateContainer",
        messages.CreateContainerRequest(
            container_id=container_id,
            spec_json=json.dumps(spec).encode(),
            rootfs=rootfs or messages.Rootfs(lower_devices=["pmem1"], upper_device=upper),
            streams=streams,
            files=files,
            init=init,
            shared_namespaces=shared,
        ),
    )
    return Running(client, container_id, "", streams)


def declare_process(
    client: AgentClient,
    init: Running,
    process: dict[str, Any],
    exec_id: str,
    *,
    terminal: bool = False,
    stdin: bool = False,
) -> Running:
    """Declare a process beside `init`; not started yet."""
    streams = _streams(client, terminal=terminal, stdin=stdin)
    client.call(
        "AddProcess",
        messages.AddProcessRequest(
            container_id=init.ref.container_id,
            exec_id=exec_id,
            process_json=json.dumps(process).encode(),
            streams=streams,
        ),
    )
    return Running(client, init.ref.container_id, exec_id, streams)


class AgentUnderTest:
    """One agent process with its client; made by `running_agent`."""

    def __init__(self, client: AgentClient, stack: ExitStack, process: subprocess.Popen[bytes],
                 directory: Path, cgroup: str) -> None:  # fmt: skip
        self.client = client
        self.process = process
        self.directory = directory
        self.cgroup = cgroup
        self._stack = stack
        self._containers = 0

    @property
    def agent_pid(self) -> int:
        """The agent's own process, as this machine numbers it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def open_files(self) -> list[str]:
        """What the agent's descriptors are, by kind; numbers are left out."""
        descriptors = Path(f"/proc/{self.agent_pid}/fd")
        return sorted(os.readlink(path).partition(":")[0] for path in descriptors.iterdir())

    def forward(self, port: int) -> socket.socket:
        """A port forward to `port` of the agent's loopback; the caller closes it."""
        connection = _dial(self.directory / "ports.sock")
        connection.sendall(struct.pack("<H", port))
        return connection

    def listen_as_host(self) -> socket.socket:
        """Where the agent dials after a reset; the caller closes it."""
        path = self.directory / "host.sock"
        path.unlink(missing_ok=True)
        return _listen(path)

    def restored(self) -> None:
        """What a restored guest sees: the control connection reset, and another host there."""
        with self.listen_as_host() as listener:
            listener.settimeout(DEADLINE_SECONDS)
            self.client.be_reset(lambda: listener.accept()[0])

    def until_it_waits_for_a_reader(self, container_id: str) -> None:
        """The one process of that container has filled its pipe, and all that is behind it."""
        (pid,) = Path(f"{self.cgroup}/{container_id}/cgroup.procs").read_text().split()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while "pipe_write" not in (shown := Path(f"/proc/{pid}/wchan").read_text()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{container_id} waits in {shown!r}")

    def logged(self) -> list[str]:
        """The agent's log so far."""
        return (self.directory / "log").read_text().splitlines()

    def state_left(self) -> list[str]:
        """What lies in the agent's state directory, beside what is the guest's for good."""
        return sorted(set(os.listdir(self.directory / "state")) - {".boot_id"})

    def attach_lower(self, image: Path, name: str = "pmem1") -> None:
        """Let the agent see `image` as /dev/`name`."""
        self._attach(image, name, "--read-only")

    def attach_upper(self, name: str = "vda", tree: Path | None = None) -> None:
        """A fresh ext4 disk, with what is in `tree`."""
        image = self.directory / f"{name}.ext4"
        with image.open("wb") as file:
            file.truncate(UPPER_BYTES)
        run("mkfs.ext4", "-q", "-F", *(("-d", str(tree)) if tree else ()), str(image))
        self._attach(image, name)

    def _attach(self, image: Path, name: str, *options: str) -> None:
        device = run("losetup", "--find", "--show", *options, str(image))
        self._stack.callback(run, "losetup", "--detach", device)
        (self.directory / "devices" / name).symlink_to(device)

    def create(self, spec: dict[str, Any], **how: Any) -> Running:
        """Create a container named c1, c2, …; not started yet. `how`: see create_container."""
        self._containers += 1
        return self.keep(create_container(self.client, f"c{self._containers}", spec, **how))

    def keep(self, running: Running) -> Running:
        """Its streams are closed with the agent."""
        self._stack.callback(running.close)
        return running

    def add(self, init: Running, process: dict[str, Any], exec_id: str, **how: Any) -> Running:
        """Declare a process in a running container; not started yet."""
        return self.keep(declare_process(self.client, init, process, exec_id, **how))


def _folder_of(package: str) -> str:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{package} is not installed; run: pip install -e .[dev,api]")
    return str(Path(spec.submodule_search_locations[0]).parent)


@contextmanager
def running_agent() -> Iterator[AgentUnderTest]:
    """An agent with no devices yet; everything of it is gone afterwards."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmcell-agent-")))
        (directory / "devices").mkdir()
        (directory / "state").mkdir()
        (directory / "share").mkdir()  # stands in for the virtio-fs share
        cgroup = f"{cgroup2_mount()}/vmcell-test-{os.getpid()}-{time.monotonic_ns()}"
        os.mkdir(cgroup)
        stack.callback(_remove_cgroup, Path(cgroup))
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        streams, ports = (_listen(directory / name) for name in ("streams.sock", "ports.sock"))
        code = _DRIVER.format(
            oom_score=AGENT_OOM_SCORE,
            path=[str(ROOT / "guest-agent"), str(ROOT / "protos"), _folder_of("h11")],
            control=theirs.fileno(),
            streams=streams.fileno(),
            ports=ports.fileno(),
            cgroup=cgroup,
            state=str(directory / "state"),
            devices=str(directory / "devices"),
            sysfs=str(directory / "sys"),
            share=str(directory / "share"),
            vm=str(directory / "vm"),
            clock=str(directory / "clock"),
            log=str(directory / "log"),
            host=str(directory / "host.sock"),
        )
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private",
             "--net", "--uts", "--ipc", "--mount-proc",
             sys.executable, "-I", "-S", "-B", "-c", code],
            pass_fds=(theirs.fileno(), streams.fileno(), ports.fileno()),
        )  # fmt: skip
        for end in (theirs, streams, ports):
            end.close()
        client = AgentClient(ours, lambda: _dial(directory / "streams.sock"))
        stack.callback(_stop, process, client)
        yield AgentUnderTest(client, stack, process, directory, cgroup)


def _listen(address: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    return listener


def _dial(address: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE_SECONDS)
    connection.connect(str(address))
    return connection


def _stop(process: subprocess.Popen[bytes], client: AgentClient) -> None:
    """The end of the control connection ends the agent; what hangs is killed and fails the test."""
    client.hang_up()
    try:
        process.wait(timeout=10)
        client.close()
    finally:
        process.kill()
        process.wait(timeout=10)


def _remove_cgroup(path: Path) -> None:
    end = time.monotonic() + 10
    while True:
        try:
            for directory in sorted(path.glob("**/"), reverse=True):
                directory.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            (path / "cgroup.kill").write_text("1")
        else:
            return
