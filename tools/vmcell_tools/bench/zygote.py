"""A zygote of the benchmark's own, and this process as one that it serves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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
    Request,
    decode_answer,
    encode_request,
)
from vmcell_tools.setup_host import INTERPRETER_FLAGS, SHIM_TEMPLATE

READY_WITHIN_S = 60.0
END_WITHIN_S = 20.0


@contextmanager
def private_zygote(folder: Path) -> Iterator[str]:
    """Its socket's path, in `folder`, where its log is too. HostError when it does not serve.

    Meanwhile VMMs of this process are forked by it: it serves those who import the same files, and
    tells that by their sys.path, so this process has the zygote's for as long.
    """
    path, log_path = str(folder / "zygote"), folder / "zygote.log"
    command = [sys.executable, INTERPRETER_FLAGS, str(SHIM_TEMPLATE), "zygote"]
    environment = {**os.environ, SOCKET_VARIABLE: path}
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
        with _served_by(path):
            yield path
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(END_WITHIN_S)


@contextmanager
def _served_by(path: str) -> Iterator[None]:
    before, variable = list(sys.path), os.environ.get(SOCKET_VARIABLE)
    sys.path[:] = _import_path(path)
    os.environ[SOCKET_VARIABLE] = path
    try:
        yield
    finally:
        sys.path[:] = before
        if variable is None:
            del os.environ[SOCKET_VARIABLE]
        else:
            os.environ[SOCKET_VARIABLE] = variable


def _import_path(path: str) -> list[str]:
    """The zygote's sys.path; HostError unless its modules are those that run here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(READY_WITHIN_S)
        sock.connect(path)
        sock.send(encode_request(Request(HELLO, b"")))
        text = decode_answer(sock.recv(MAX_DATAGRAM_BYTES)).output.decode(errors="surrogateescape")
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
