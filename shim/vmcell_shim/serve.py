"""The life of one shim process: a server on the socket `start` has bound, until nothing is left.

It ends after a Shutdown that found no task, or when nobody has been connected for a while and there
is no task to be connected to (a daemon that died between `start` and Create leaves such shims).
SIGTERM does not end a shim that has a task: systemd sends it to all of containerd's processes.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from vmcell_shim.dispatch import Dispatch
from vmcell_shim.events import EventPublisher
from vmcell_shim.journal import Journal
from vmcell_shim.registry import Registry
from vmcell_shim.server import TtrpcServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.args import Invocation

# Of each thread; vmcell_runtime.vmm says why.
_STACK_BYTES = 1 << 20
_IDLE_S = 30.0
_TICK_S = 5.0
_FLUSH_S = 2.0
_ANSWER_S = 1.0


def serve(listener_fd: int, path: str, invocation: Invocation, bundle: str) -> None:
    """Runs until the shim has nothing to do any more; the socket's file `path` is removed then."""
    threading.stack_size(_STACK_BYTES)
    journal = Journal(os.path.join(bundle, "log"), invocation.id)
    journal.catch_bugs()
    _outlive_containerd(journal)
    events = EventPublisher(
        namespace=invocation.namespace,
        ttrpc_address=os.environ.get("TTRPC_ADDRESS") or f"{invocation.address}.ttrpc",
        grpc_address=invocation.address,
        publish_binary=invocation.publish_binary,
        journal=journal,
    )
    listener = socket.socket(fileno=listener_fd)
    stop = _Stop()
    registry = Registry(invocation.namespace, events, journal)
    server = TtrpcServer(listener, Dispatch(registry, stop).handle, journal)
    stop.server = server
    seen = time.monotonic()

    def still_needed() -> bool:
        nonlocal seen
        if registry.in_use or server.connection_count:
            seen = time.monotonic()
        return time.monotonic() - seen < _IDLE_S

    signal.signal(signal.SIGTERM, lambda *_: None if registry.in_use else server.stop())
    try:
        server.serve(_TICK_S, still_needed)
    finally:
        if os.path.exists(path):
            os.unlink(path)
        server.close(_ANSWER_S)
        events.flush(_FLUSH_S)
        events.close()
        journal.close()


class _Stop:
    """Ends the server once there is one."""

    server: TtrpcServer | None = None

    def __call__(self) -> None:
        if self.server is not None:
            self.server.stop()


def _outlive_containerd(journal: Journal) -> None:
    """Hang-ups are ignored; like runc's shim, one step easier to kill than containerd itself."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            score = int(file.read())
            file.seek(0)
            file.write(str(min(score + 1, 1000)))
    except OSError as error:
        journal.warning(f"oom_score_adj stays as it is: {error}")
