"""Entry: envd as pid 1 of its container. `run` is all the agent calls.

Every module envd needs is imported by importing this one: after the agent has entered the
container's root there is no standard library to load from.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

from .accounts import Accounts
from .connection import Application, Connection
from .initialise import SetClock, set_clock
from .layer import UpperDirectory
from .layer_route import LayerRoute
from .loop import READABLE, Loop
from .process_table import ProcessTable
from .router import Endpoint, Router
from .settings import Settings

PORT = 49983
_BACKLOG = 512
_SWEEP_SECONDS = 30.0
# A listener rests this long when descriptors have run out, instead of spinning.
_REST_SECONDS = 0.1


class Listener:
    """One listening socket and its connections."""

    def __init__(self, loop: Loop, sock: socket.socket, application: Application) -> None:
        self._loop = loop
        self._socket = sock
        self._application = application
        self._connections: set[Connection] = set()
        self._sweeping = False
        sock.setblocking(False)
        loop.watch(sock.fileno(), READABLE, self._on_event)

    def close(self) -> None:
        self._loop.forget(self._socket.fileno())
        self._socket.close()
        for connection in tuple(self._connections):
            connection.close()

    def _on_event(self, mask: int) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            self._loop.forget(self._socket.fileno())
            self._loop.after(_REST_SECONDS, self._resume)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose machine vanished must not hold a process's output for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connections.add(
            Connection(self._loop, sock, self._application, self._connections.discard)
        )
        if not self._sweeping:
            self._sweeping = True
            self._loop.after(_SWEEP_SECONDS, self._sweep)

    def _resume(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.watch(self._socket.fileno(), READABLE, self._on_event)

    def _sweep(self) -> None:
        """Close what has stalled; an idle machine without connections is not woken."""
        now_s = time.monotonic()
        for connection in tuple(self._connections):
            if connection.stalled(now_s):
                connection.close()
        self._sweeping = bool(self._connections)
        if self._sweeping:
            self._loop.after(_SWEEP_SECONDS, self._sweep)


def _listen(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_everywhere(port: int) -> list[socket.socket]:
    """IPv4, and IPv6 where the kernel has it. Raises OSError when IPv4 cannot be had."""
    sockets = [_listen(socket.AF_INET, "0.0.0.0", port)]
    try:
        sockets.append(_listen(socket.AF_INET6, "::", port))
    except OSError:
        # No IPv6 in this kernel or container: IPv4 is what ingress uses.
        return sockets
    return sockets


class _Signals:
    """SIGCHLD and SIGTERM as events of the loop (signal.set_wakeup_fd)."""

    def __init__(self, loop: Loop, on_child: Callable[[], None]) -> None:
        self._loop = loop
        self._on_child = on_child
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        loop.watch(self._reader.fileno(), READABLE, self._on_event)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            # The handler itself has nothing to do: the wakeup descriptor tells.
            signal.signal(number, lambda number, frame: None)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            # A client or a child that left is an error of one call, not the end of all.
            signal.signal(number, signal.SIG_IGN)

    def _on_event(self, mask: int) -> None:
        try:
            numbers = self._reader.recv(4096)
        except BlockingIOError:
            return
        # A full buffer loses numbers, so children are looked for whatever came.
        self._on_child()
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._loop.stop()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self._loop.forget(self._reader.fileno())
        self._reader.close()
        self._writer.close()


def run(
    *,
    ready: Callable[[], None],
    port: int = PORT,
    environment: Mapping[str, str] | None = None,
    clock: SetClock = set_clock,
    layer: Endpoint | None = None,
) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then SystemExit(143); pid 1's end ends the container.

    Binds 0.0.0.0:`port` and [::]:`port`, calls `ready` once both listen. `environment` is what
    processes start from besides HOME, USER and LOGNAME (the image's Env), default os.environ.
    Raises OSError when the port cannot be bound.
    """
    os.umask(0o022)
    _open_standard_streams()
    with ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        settings = Settings(Accounts(), os.environ if environment is None else environment)
        table = ProcessTable(loop)
        router = Router(loop, settings, table, clock, layer)
        for sock in _listen_everywhere(port):
            stack.callback(Listener(loop, sock, router).close)
        stack.callback(_Signals(loop, table.reap).close)
        # What is loaded now lives for ever; keeping the collector off it keeps forks cheap.
        gc.freeze()
        ready()
        # Children that ended before their signal was watched.
        table.reap()
        loop.run()
    raise SystemExit(128 + signal.SIGTERM)


def run_builder(upper: int, **options: Any) -> NoReturn:
    """`run` with GET /layer over the upper directory behind the descriptor `upper`."""
    # Kept above the standard streams, whose numbers `run` fills.
    held = fcntl.fcntl(upper, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(upper)
    run(layer=LayerRoute(UpperDirectory(held)), **options)


def _open_standard_streams() -> None:
    """Numbers 0 to 2 must never be given to a socket or a pipe."""
    while True:
        descriptor = os.open("/dev/null", os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)
