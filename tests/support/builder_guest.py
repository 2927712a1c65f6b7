"""envd as a build has it, in a container of a real agent on this host, and layers as OCI says.

`apply_layer` is a reader of layers written apart from the writer, so that both cannot be wrong in
the same way (image-spec 1.0, layer.md).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from agent_harness import AgentUnderTest, container_spec, process_spec

from vmcell_api.node.guest_process import Command, GuestProcesses

ENVD_PORT = 49983
CAPABILITIES = [
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW"),
    *("CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE"),
    *("CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"),
]


class BuilderGuest:
    """A running builder: `processes` are its envd's calls."""

    def __init__(self, processes: GuestProcesses) -> None:
        self.processes = processes

    def sh(self, script: str, *, user: str = "root", status: int = 0) -> str:
        """Output of a script, which must end with `status`."""
        output = bytearray()
        found = self.processes.run(
            Command(text=script, user=user, environment={"PATH": "/bin"}),
            deadline=time.monotonic() + 60,
            on_output=lambda _, data: output.extend(data),
        )
        text = output.decode(errors="replace")
        assert found == status, f"{script}: {found}: {text}"
        return text

    def layer(self) -> bytes:
        """The next layer."""
        with self.processes.layer(deadline=time.monotonic() + 60) as pieces:
            return b"".join(pieces)


@contextlib.contextmanager
def builder_guest(agent: AgentUnderTest) -> Iterator[BuilderGuest]:
    """Starts the builder in a container with the agent's devices."""
    caps = {name: CAPABILITIES for name in ("bounding", "effective", "permitted")}
    process = process_spec("envd", capabilities=caps, noNewPrivileges=False)
    agent.create(container_spec(process), init="envd-builder").start()
    with _relay(agent) as port:
        yield BuilderGuest(GuestProcesses("127.0.0.1", "", port=port))


@contextlib.contextmanager
def _relay(agent: AgentUnderTest) -> Iterator[int]:
    """A TCP port here that leads to envd in the agent's network namespace."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_join, args=(client, agent.forward(ENVD_PORT))).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def _join(client: socket.socket, guest: socket.socket) -> None:
    guest.settimeout(None)
    with client, guest:
        there = threading.Thread(target=_copy, args=(client, guest))
        there.start()
        _copy(guest, client)
        there.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def apply_layer(tree: Path, layer: bytes) -> list[str]:
    """Puts a layer above `tree`; answers the names in it."""
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        members = tar.getmembers()
        for member in members:
            name = Path(member.name).name
            place = tree / Path(member.name).parent
            if not _is_dir(place):
                continue  # it is made, or takes the place of a file, by this layer
            if name == ".wh..wh..opq":
                for entry in list(place.iterdir()):
                    _remove(entry)
            elif name.startswith(".wh."):
                _remove(place / name.removeprefix(".wh."))
        for member in members:
            target = tree / member.name
            if target.name.startswith(".wh."):
                continue
            if os.path.lexists(target) and not (member.isdir() and _is_dir(target)):
                _remove(target)
            tar.extract(member, tree, numeric_owner=True)
    return [member.name for member in members]


def _is_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_dir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
