"""`start`: bind the socket, answer the address, and become the server in a process of its own.

containerd reads stdout and stderr through one pipe until its end, so nothing but the answer is
written and the server keeps none of the inherited descriptors. Every task create waits for this:
only what is built into the interpreter is imported before the answer.
Source: containerd runtime/v2/shim/shim.go; reference: shim-contract 1.2 (answers by version).
"""

from __future__ import annotations

import os

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.bundle import group_id, socket_path, write_address
from vmcell_shim.listening import listen

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from vmcell_protos.bootstrap import BootstrapParams
    from vmcell_shim.args import Invocation

STDIN_LIMIT_BYTES = 4 << 20
# Where containerd 2.x keeps the bundles of the sandbox API; only there it wants version 3.
SANDBOX_BUNDLES = "/io.containerd.sandbox.controller.v1.shim/"


class Started:
    """The answer for containerd, and the socket at `path` for the server behind it; no listener:
    there is a server already."""

    __slots__ = ("answer", "listener", "path")

    def __init__(self, answer: str, listener: _socket.socket | None, path: str) -> None:
        self.answer = answer.encode()
        self.listener = listener
        self.path = path


def start(invocation: Invocation, stdin: bytes) -> Started:
    """Binds the group's socket, unless its server answers there already, and notes its address.

    `stdin` is what containerd wrote there. Raises CallerError, HostError; nothing is left then.
    """
    if len(stdin) > STDIN_LIMIT_BYTES:
        raise CallerError(f"stdin holds more than {STDIN_LIMIT_BYTES} bytes of options")
    bundle = os.getcwd()
    params = bootstrap_params(stdin, invocation)
    group = group_id(bundle, invocation.id)
    directory = params.socket_dir or "" if params else ""
    path = socket_path(invocation.address, invocation.namespace, group, directory)
    address = f"unix://{path}"
    listener = listen(path)
    try:
        write_address(bundle, address)
    except HostError:
        if listener is not None:
            os.unlink(path)
            listener.close()
        raise
    if params is None and SANDBOX_BUNDLES not in bundle:
        return Started(address, listener, path)
    answer = f'{{"version":3,"address":"{address}","protocol":"ttrpc"}}'
    return Started(answer, listener, path)


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


def become_server(started: Started, invocation: Invocation, bundle: str) -> None:
    """The rest of this process's life: own session, none of the caller's descriptors.

    It returns when the server has ended. Leads a session already: a zygote's child.
    """
    if started.listener is None:
        raise ValueError("there is a server already")
    if os.getsid(0) != os.getpid():
        os.setsid()
    # Not through /dev/null's number: nothing below 3 may be closed and given away again.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    listener = started.listener.detach()
    if listener != 3:
        os.dup2(listener, 3, inheritable=False)
    os.closerange(4, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)
    from vmcell_shim.serve import serve

    serve(3, started.path, invocation, bundle)
