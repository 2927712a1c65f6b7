"""The whole service in the foreground: noded, the API, the router and nginx.

`python -m vmcell_api.serve` (or `vmcell serve`) starts them in this order, passes their logs on and
ends all of them on SIGTERM, SIGINT or when one ends by itself. Sandboxes go on without it. The
three Python processes are forked from this one, so their imports are paid for once, and noded,
which needs none of the web's, makes its slots while this one imports these and migrates the store.
Nothing here may start a thread or a gRPC channel before the last fork.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

import vmcell_api.node.__main__ as noded
from vmcell_api import logs
from vmcell_api.config import ApiConfig, load_config
from vmcell_api.nginx import NginxPlan, render
from vmcell_protos.errors import HostError, VmcellError

log = logging.getLogger("vmcell.serve")

READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
POLL_S = 0.05


class Child(Protocol):
    """What a forked and an executed child have in common."""

    name: str

    def status(self) -> int | None:
        """The exit status, None while it runs."""

    def signal(self, number: int) -> None:
        """Sends a signal; an ended child is fine."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""


class Forked:
    """A child that runs a function of ours in a session of its own."""

    def __init__(self, name: str, run_child: Callable[[], int]) -> None:
        self.name = name
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_run_forked, args=(run_child,), name=name)
        self._process.start()

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Sends a signal; an ended child is fine."""
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        self._process.join(timeout_s)
        return not self._process.is_alive()


class Executed:
    """A child that is another program, in a session of its own."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except FileNotFoundError as error:
            raise HostError(f"cannot start {name}: {command[0]} is not installed") from error

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Sends a signal; an ended child is fine."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


class Service:
    """The child processes; `stop()` is idempotent and ends them in reverse order."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._children: list[Child] = []
        self.ending = False

    def start(self) -> None:
        """Starts everything; returns when all of it listens. Raises HostError."""
        config = self._config
        self._children.append(Forked("noded", lambda: noded.serve(config)))
        self._start_web()
        self._wait_for("noded", lambda: _unix_listens(config.node_socket))
        self._wait_for("the router", lambda: _unix_listens(config.route_socket))
        self._wait_for("the API", lambda: _tcp_listens(config.api_bind))
        self._wait_for("nginx", lambda: _tcp_listens(config.data_bind))

    def _start_web(self) -> None:
        import vmcell_api.__main__ as api
        from vmcell_api import route_server
        from vmcell_api.store.database import migrate

        config = self._config
        migrate(config.database_url, owner_uid=config.api_uid)
        self._children.append(Forked("the API", lambda: api.serve_api(config)))
        self._children.append(Forked("the router", lambda: route_server.serve_routes(config)))
        nginx = ["nginx", "-p", config.nginx_dir, "-c", write_nginx(config)]
        self._children.append(Executed("nginx", nginx))

    def watch(self) -> None:
        """Returns when `ending` is set; raises HostError when a child ends by itself."""
        while not self.ending:
            self._check_children()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends the children, the last started first; kills what does not end in time."""
        for child in reversed(self._children):
            child.signal(signal.SIGTERM)
            if not child.wait(STOP_TIMEOUT_S):
                _say(f"{child.name} did not end within {STOP_TIMEOUT_S} s; killing it")
                child.signal(signal.SIGKILL)
                child.wait(STOP_TIMEOUT_S)
        self._children = []

    def _wait_for(self, name: str, listens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.ending and not listens():
            self._check_children()
            if time.monotonic() > deadline:
                raise HostError(f"{name} did not listen within {READY_TIMEOUT_S} s; see its log")
            time.sleep(POLL_S)

    def _check_children(self) -> None:
        for child in self._children:
            status = child.status()
            if status is not None and not self.ending:
                raise HostError(f"{child.name} ended with status {status}; see its log above")


def _run_forked(run_child: Callable[[], int]) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(run_child())


def write_nginx(config: ApiConfig) -> str:
    """Writes nginx's configuration and folder; answers the path. Raises HostError."""
    from vmcell_api import route_server

    route_server.nginx_gid(config.nginx_user)
    plan = NginxPlan(
        listen=config.data_bind,
        route_socket=config.route_socket,
        folder=config.nginx_dir,
        user=config.nginx_user,
    )
    path = Path(config.nginx_dir, "nginx.conf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(plan))
    except OSError as error:
        raise HostError(f"cannot write {path}: {error}") from error
    return str(path)


def run(config: ApiConfig) -> None:
    """Serves until a signal comes; raises HostError when something cannot start or ends."""
    if os.geteuid() != 0:
        raise HostError("the service needs root for noded (containerd, TAPs); run it as root")
    os.umask(0o022)  # nginx's user and the API's pass through the folders made here
    service = Service(config)

    def end(number: int, frame: FrameType | None) -> None:
        service.ending = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    try:
        service.start()
        if not service.ending:
            _say(f"API on http://{config.api_bind}, sandboxes on http://{config.data_bind}")
        service.watch()
    finally:
        service.stop()
    _say("stopped")


def _unix_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def _tcp_listens(bind: str) -> bool:
    address, _, port = bind.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex((address or "127.0.0.1", int(port))) == 0


def _say(sentence: str) -> None:
    log.info("%s", sentence)


def main() -> int:
    """The command; answers its exit status."""
    logs.set_up("vmcell", "text")
    try:
        config = load_config()
        logs.set_up("vmcell", config.log_format)
        run(config)
    except VmcellError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
