"""The whole service in the foreground: noded, the API, the router and nginx.

`python -m vmcell_api.serve` (or `vmcell serve`) starts them in this order, passes their logs on and
ends all of them on SIGTERM, SIGINT or when one ends by itself. Sandboxes go on without it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from vmcell_api.config import ApiConfig, load_config
from vmcell_api.nginx import NginxPlan, render
from vmcell_api.route_server import nginx_gid
from vmcell_api.store.database import migrate
from vmcell_protos.errors import HostError, VmcellError

READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
POLL_S = 0.2


class Service:
    """The child processes; `stop()` is idempotent and ends them in reverse order."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._children: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.ending = False

    def start(self) -> None:
        """Starts everything; returns when all of it listens. Raises HostError."""
        config = self._config
        migrate(config.database_url, owner_uid=config.api_uid)
        self._start("noded", [sys.executable, "-m", "vmcell_api.node"])
        self._wait_for("noded", lambda: _unix_listens(config.node_socket))
        self._start("the API", [sys.executable, "-m", "vmcell_api"])
        self._start("the router", [sys.executable, "-m", "vmcell_api.route_server"])
        self._start("nginx", ["nginx", "-p", config.nginx_dir, "-c", write_nginx(config)])
        self._wait_for("the router", lambda: _unix_listens(config.route_socket))
        self._wait_for("the API", lambda: _tcp_listens(config.api_bind))
        self._wait_for("nginx", lambda: _tcp_listens(config.data_bind))

    def watch(self) -> None:
        """Returns when `ending` is set; raises HostError when a child ends by itself."""
        while not self.ending:
            self._check_children()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends the children, the last started first; kills what does not end in time."""
        for name, child in reversed(self._children):
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _say(f"{name} did not end within {STOP_TIMEOUT_S} s; killing it")
                child.kill()
                child.wait()
        self._children = []

    def _start(self, name: str, command: list[str]) -> None:
        _say(f"starting {name}")
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        except FileNotFoundError as error:
            raise HostError(f"cannot start {name}: {command[0]} is not installed") from error
        self._children.append((name, child))

    def _wait_for(self, name: str, listens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.ending and not listens():
            self._check_children()
            if time.monotonic() > deadline:
                raise HostError(f"{name} did not listen within {READY_TIMEOUT_S} s; see its log")
            time.sleep(POLL_S)

    def _check_children(self) -> None:
        for name, child in self._children:
            if child.poll() is not None:
                raise HostError(f"{name} ended with status {child.returncode}; see its log above")


def write_nginx(config: ApiConfig) -> str:
    """Writes nginx's configuration and folder; answers the path. Raises HostError."""
    nginx_gid(config.nginx_user)
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
    sys.stderr.write(f"vmcell: {sentence}\n")
    sys.stderr.flush()


def main() -> int:
    """The command; answers its exit status."""
    try:
        run(load_config())
    except VmcellError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
