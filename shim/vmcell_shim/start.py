"""`start`: bind the socket, leave the server behind in a process of its own, answer the address.

containerd reads stdout and stderr through one pipe until its end, so nothing but the answer is
written and the server keeps none of the inherited descriptors. Every task create waits for this:
only what is built into the interpreter is imported before the answer.
Source: containerd runtime/v2/shim/shim.go; reference: shim-contract 1.2 (answers by version).
"""

from __future__ import annotations

import _socket
import errno
import os

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.bundle import answers, group_id, socket_path, write_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.bootstrap import BootstrapParams
    from vmcell_shim.args import Invocation

_STDIN_LIMIT_BYTES = 4 << 20
_BACKLOG = 64
# Where containerd 2.x keeps the bundles of the sandbox API; only there it wants version 3.
SANDBOX_BUNDLES = "/io.containerd.sandbox.controller.v1.shim/"


def start(invocation: Invocation) -> bytes:
    """The answer for containerd; behind it a server runs. Raises CallerError, HostError.

    In the child process it returns only when the server has ended, with an empty answer.
    """
    bundle = os.getcwd()
    params = bootstrap_params(read_stdin(), invocation)
    group = group_id(bundle, invocation.id)
    directory = params.socket_dir or "" if params else ""
    path = socket_path(invocation.address, invocation.namespace, group, directory)
    address = f"unix://{path}"
    listener = bind(path)
    try:
        write_address(bundle, address)
    except HostError:
        if listener is not None:
            os.unlink(path)
        raise
    if listener is not None:
        pid = os.fork()
        if pid == 0:
            _become_server(listener, invocation, bundle)
            return b""
        listener.close()
    if params is None and SANDBOX_BUNDLES not in bundle:
        return address.encode()
    return f'{{"version":3,"address":"{address}","protocol":"ttrpc"}}'.encode()


def read_stdin() -> bytes:
    """What containerd wrote: nothing, the runtime's options, or (2.3 on) BootstrapParams."""
    try:
        if os.isatty(0):
            return b""
        data = b""
        while chunk := os.read(0, 64 << 10):
            data += chunk
            if len(data) > _STDIN_LIMIT_BYTES:
                raise CallerError(f"stdin holds more than {_STDIN_LIMIT_BYTES} bytes of options")
    except OSError:
        # No stdin at all: as empty as /dev/null.
        return b""
    return data


def bootstrap_params(data: bytes, invocation: Invocation) -> BootstrapParams | None:
    """BootstrapParams when `data` is one (its names equal the flags'), None for anything else.

    Options (an Any) read as BootstrapParams too, with a type URL where the id stands.
    """
    if not data:
        return None
    from vmcell_protos.bootstrap import BootstrapParams
    from vmcell_protos.wire import WireError

    try:
        params = BootstrapParams.decode(data)
    except WireError:
        return None
    same = (params.instance_id, params.namespace) == (invocation.id, invocation.namespace)
    return params if same else None


def bind(path: str) -> _socket.socket | None:
    """A listening socket at `path`, or None when a shim of this group answers there already."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
        try:
            _bind_private(listener, path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if answers(path):
                listener.close()
                return None
            os.unlink(path)
            _bind_private(listener, path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(f"cannot listen on {path}: {error}") from error
    return listener


def _bind_private(listener: _socket.socket, path: str) -> None:
    umask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(umask)


def _become_server(listener: _socket.socket, invocation: Invocation, bundle: str) -> None:
    """The rest of the child's life: own session, none of the caller's descriptors."""
    os.setsid()
    # Not through /dev/null's number: nothing below 3 may be closed and given away again.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    kept = os.dup2(listener.detach(), 3, inheritable=False) if listener.fileno() != 3 else 3
    if kept == 3 and listener.fileno() == 3:
        listener.detach()
    os.closerange(4, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)
    from vmcell_shim.serve import serve

    serve(3, invocation, bundle)
