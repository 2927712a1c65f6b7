"""What stands in a bundle, as far as `start` and `delete` need it: group, socket, address.

Part of the path that every task create waits for, so it imports nothing that is not built into the
interpreter, and reads config.json as JSON only when it has something to find in it.
Source: containerd runtime/v2/shim/util.go (SocketAddress, WriteAddress), runc/manager (group).
"""

from __future__ import annotations

import os

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.listening import remove_dead

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET_DIR = "/run/containerd/s"
# sockaddr_un: 108 bytes with the ending zero; containerd itself keeps one more free.
SOCKET_PATH_LIMIT_BYTES = 106
# The first of these that the spec carries names the group a container belongs to.
GROUP_ANNOTATIONS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")


def group_id(bundle: str, container_id: str) -> str:
    """The id of the group (pod) this container belongs to; its own when it stands alone, or when
    the bundle is a sandbox's without a container (containerd 2.x with `sandboxer = "shim"`)."""
    try:
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            data = file.read(4 << 20)
    except FileNotFoundError:
        return container_id
    if not any(name.encode() in data for name in GROUP_ANNOTATIONS):
        return container_id
    import json

    try:
        annotations = json.loads(data).get("annotations") or {}
    except (ValueError, AttributeError, RecursionError):
        # Create reads it again and says what is wrong with it.
        return container_id
    for name in GROUP_ANNOTATIONS:
        value = annotations.get(name) if isinstance(annotations, dict) else None
        if isinstance(value, str) and value:
            return value
    return container_id


def socket_path(address: str, namespace: str, group: str, directory: str) -> str:
    """Where the shim of a group listens; every caller computes the same. Raises CallerError."""
    name = _sha256()(f"{os.path.join(address, namespace, group)}".encode()).hexdigest()
    path = os.path.join(directory or SOCKET_DIR, name)
    if len(path.encode()) > SOCKET_PATH_LIMIT_BYTES:
        raise CallerError(
            f"socket path {path} is longer than {SOCKET_PATH_LIMIT_BYTES} bytes; "
            "use a shorter socket_dir"
        )
    return path


def write_address(bundle: str, address: str) -> None:
    """The file by which containerd 1.6 and 1.7 find the shim again after a restart. HostError."""
    # A name of its own: a start that a zygote was asked for in vain may still be under way.
    temporary = os.path.join(bundle, f".address.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(fd, address.encode())
        finally:
            os.close(fd)
        os.rename(temporary, os.path.join(bundle, "address"))
    except OSError as error:
        raise HostError(f"cannot write the shim's address into {bundle}: {error}") from error


def remove_dead_socket(bundle: str) -> None:
    """Removes the socket of a shim that was killed; one that answers stays."""
    try:
        with open(os.path.join(bundle, "address"), encoding="utf-8") as file:
            path = file.read().removeprefix("unix://")
        if path.startswith("/"):
            remove_dead(path)
    except FileNotFoundError:
        # The shim never came so far, or has cleaned up behind itself.
        return


def _sha256() -> Callable[[bytes], _Hash]:
    """CPython 3.11's built-in hash where there is one: importing hashlib costs 5 ms."""
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # no stub for a private module
    except ImportError:
        from hashlib import sha256
    function: Callable[[bytes], _Hash] = sha256
    return function


if TYPE_CHECKING:
    from typing import Protocol

    class _Hash(Protocol):
        def hexdigest(self) -> str: ...
