"""Zygotes of the benchmark's own, and this process as one that they serve."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vmcell_protos
import vmcell_runtime
from vmcell_protos.errors import HostError
from vmcell_protos.zygote import (
    HELLO,
    MAX_DATAGRAM_BYTES,
    SOCKET_VARIABLE,
    Answer,
    Request,
    decode_answer,
    encode_request,
)
from vmcell_shim.spares import COUNT_VARIABLE, SPARE_NAME
from vmcell_tools.setup_host import INTERPRETER_FLAGS, SHIM_TEMPLATE

READY_WITHIN_S = 60.0
END_WITHIN_S = 20.0
_POLL_S = 0.005


@contextmanager
def private_zygote(folder: Path, spares: int) -> Iterator[str]:
    """Its socket's path, in `folder`, where its log is too; it keeps so many spare VMMs of a size.
    HostError when it does not serve.

    Meanwhile VMMs of this process are forked by it: it serves those who import the same files, and
    tells that by their sys.path, so this process has the zygote's for as long.
    """
    path, log_path = str(folder / f"zygote{spares}"), folder / f"zygote{spares}.log"
    command = [sys.executable, INTERPRETER_FLAGS, str(SHIM_TEMPLATE), "zygote"]
    environment = {**os.environ, SOCKET_VARIABLE: path, COUNT_VARIABLE: str(spares)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, log_path.open("ab") as log:
        ready.bind("")  # an abstract name of the kernel's choice
        ready.settimeout(READY_WITHIN_S)
        environment["NOTIFY_SOCKET"] = "@" + ready.getsockname()[1:].decode()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=log)
        try:
            if ready.recv(4096) != b"READY=1":
                raise TimeoutError
        except TimeoutError as error:
            _end(process)
            raise HostError(f"a zygote did not serve: {log_path.read_text()[-400:]}") from error
    try:
        with _imports_of(path), served_by(path):
            yield path
    finally:
        _end(process)


@contextmanager
def served_by(path: str) -> Iterator[None]:
    """This process's VMMs come from that one meanwhile."""
    before = os.environ.get(SOCKET_VARIABLE)
    os.environ[SOCKET_VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[SOCKET_VARIABLE]
        else:
            os.environ[SOCKET_VARIABLE] = before


def wait_for_spare(path: str) -> None:
    """Until the zygote at `path` has a spare VMM that is ready. HostError when it has none."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not spares_of(path):
        if time.monotonic() > deadline:
            raise HostError("the zygote has no spare VMM; its log, beside its socket, may say why")
        time.sleep(_POLL_S)
    _hello(path)  # it has heard of it then


def spares_of(path: str) -> list[int]:
    """The pids of its spare VMMs that have said to be ready."""
    pid = _hello(path).number
    names = (entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [int(name) for name in names if _is_spare(Path("/proc", name), pid)]


def _is_spare(entry: Path, zygote: int) -> bool:
    try:
        if (entry / "comm").read_text().rstrip() != SPARE_NAME:
            return False
        return parent(int(entry.name)) == zygote
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent(pid: int) -> int:
    """The parent's pid; FileNotFoundError or ProcessLookupError when there is no such process."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(END_WITHIN_S)


@contextmanager
def _imports_of(path: str) -> Iterator[None]:
    """This process's sys.path is that of the zygote meanwhile."""
    before = list(sys.path)
    sys.path[:] = _import_path(path)
    try:
        yield
    finally:
        sys.path[:] = before


def _import_path(path: str) -> list[str]:
    """The zygote's sys.path; HostError unless its modules are those that run here."""
    text = _hello(path).output.decode(errors="surrogateescape")
    version = sys.version
    _, _, rest = text.partition("\n")
    if not rest.startswith(f"{version}\n"):
        raise HostError(f"the zygote's interpreter is {rest[:80]!r} and this one's is {version!r}")
    found = rest.removeprefix(f"{version}\n").split("\n")
    for module in (vmcell_protos, vmcell_runtime):
        root = str(Path(module.__file__ or "").resolve().parents[1])
        if root not in found:
            raise HostError(f"the zygote imports from {found} and this process from {root}")
    return found


def _hello(path: str) -> Answer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(READY_WITHIN_S)
        sock.connect(path)
        sock.send(encode_request(Request(HELLO, b"")))
        return decode_answer(sock.recv(MAX_DATAGRAM_BYTES))
