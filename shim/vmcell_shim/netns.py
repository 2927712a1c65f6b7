"""Network namespaces of the host: which one a spec means, how to run inside one, make, remove one.

A thread enters a namespace with setns(2) and ends afterwards; the process never changes its own.
Sources: OCI runtime-spec config-linux.md § Namespaces, setns(2), network_namespaces(7), and
nerdctl's pkg/ocihook, which has the annotation from the runtime.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from contextlib import suppress

from vmcell_protos import rtnetlink
from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.oci_json import take, take_rows
from vmcell_shim.rtnetlink_socket import RtnetlinkSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from vmcell_shim.oci_json import Json

    T = TypeVar("T")

# Where the networks of nerdctl's hooks are to be made; of the hooks' state, see `hooks`.
NERDCTL_ANNOTATION = "nerdctl/network-namespace"

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_MS_BIND = 0x1000
_MNT_DETACH = 2
_LOOPBACK_INDEX = 1
# Of the host: where containerd's own network is, and where this process runs.
_HOST_NAMESPACES = ("/proc/1/ns/net", "/proc/self/ns/net")

_libc = ctypes.CDLL(None, use_errno=True)


def wanted_namespace(spec: Json) -> str:
    """The path of the namespace a spec joins; "" when it asks for a new one.

    CallerError when that is the host's own or does not exist.
    """
    rows = [row for row in take_rows(spec, "linux.namespaces") if row.get("type") == "network"]
    path = take(rows[0], "path", str, "") if rows else ""
    if not path:
        annotation = take(spec, "annotations", dict, {}).get(NERDCTL_ANNOTATION, "")
        if not isinstance(annotation, str):
            raise CallerError(f"annotation {NERDCTL_ANNOTATION} is {annotation!r}; it takes a path")
        path = annotation
    if not rows and not path:
        raise CallerError(
            "config.json lists no network namespace, which asks for the host's network; a microVM "
            "has a network of its own, so leave out --net-host or hostNetwork",
            code="unimplemented",
        )
    if path and _is_of_the_host(path):
        raise CallerError(
            f"network namespace {path} is the host's; a microVM has a network of its own",
            code="unimplemented",
        )
    return path


def open_namespace(path: str) -> int:
    """A descriptor of the namespace's file; the caller closes it. Holding it keeps the namespace
    alive. CallerError(not_found) when there is no such file or it is no network namespace."""
    try:
        # A FIFO in that place must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CallerError(
            f"network namespace {path} cannot be opened: {error.strerror}", code="not_found"
        ) from error
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0  # as the file under a mount that has been taken away
    if kind != _CLONE_NEWNET:
        os.close(fd)
        raise CallerError(f"{path} is no network namespace", code="not_found")
    return fd


def in_namespace(namespace: int, function: Callable[[], T]) -> T:
    """What `function` returns or raises in a thread of its own inside the namespace of that
    descriptor. What is opened there (sockets, TAPs) and what is started there stays inside.

    HostError when the namespace cannot be entered.
    """
    return _in_thread(lambda: _call("setns", namespace, _CLONE_NEWNET), function)


def make_namespace(path: str) -> None:
    """A new namespace with its loopback up, held by a mount on the new file `path`, as `ip netns`
    does it. Raises HostError; nothing is left then."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
    except OSError as error:
        raise HostError(f"cannot make network namespace {path}: {error.strerror}") from error
    try:
        _in_thread(lambda: _call("unshare", _CLONE_NEWNET), lambda: _settle(path))
    except BaseException:
        remove_namespace(path)
        raise


def remove_namespace(path: str) -> None:
    """Takes the mount and the file of make_namespace() away; nothing to do where they are gone.

    The namespace itself lives as long as something is inside. Raises HostError.
    """
    try:
        _call("umount2", os.fsencode(path), _MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise HostError(f"cannot unmount network namespace {path}: {error}") from error
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove network namespace {path}: {error}") from error


def _is_of_the_host(path: str) -> bool:
    try:
        wanted = os.stat(path)
    except OSError as error:
        raise CallerError(
            f"network namespace {path} cannot be used: {error.strerror}", code="not_found"
        ) from error
    for host in _HOST_NAMESPACES:
        # A PID 1 that may not be looked at is outside the container that containerd runs in.
        with suppress(PermissionError):
            if os.path.samestat(wanted, os.stat(host)):
                return True
    return False


def _settle(path: str) -> None:
    source = b"/proc/thread-self/ns/net"
    _call("mount", source, os.fsencode(path), None, _MS_BIND, None)
    with RtnetlinkSocket() as kernel:
        kernel.request(rtnetlink.set_link(_LOOPBACK_INDEX, up=True), f"bring up lo in {path}")


def _in_thread(enter: Callable[[], None], function: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            try:
                enter()
            except OSError as error:
                raise HostError(f"cannot enter a network namespace: {error}") from error
            results.append(function())
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _call(name: str, *arguments: int | bytes | None) -> None:
    """One call of libc's that answers 0 or sets errno; raises OSError."""
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
