"""The service with real envds instead of machines: the API, the router and nginx as they are.

Each sandbox is an envd of its own on an address of the loopback, in namespaces of its own (see
envd_harness); what is missing is the microVM, containerd and noded. `python envd_node.py COMMAND…`
runs a command with the service's addresses and key in VMCELL_API_URL, VMCELL_SANDBOX_URL and
E2B_API_KEY.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from api_service import ApiService, api_service, listening
from envd_harness import free_port, running_envd, wait_until
from fake_node import FakeNode

from vmcell_api.nginx import NginxPlan, render
from vmcell_api.node.guest_init import initialise
from vmcell_api.node_client import NewSandbox, RunningSandbox

PATIENCE_S = 30.0


class EnvdNode(FakeNode):
    """A node whose sandboxes are envds; all of them end with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._envds: dict[str, contextlib.ExitStack] = {}
        self._count = 0
        self._guard = threading.Lock()

    def create(self, sandbox: NewSandbox) -> RunningSandbox:
        with self._guard:
            self._count += 1
            self.address = f"127.0.77.{self._count}"
            running = super().create(sandbox)
        stack = contextlib.ExitStack()
        folder = self._folder / sandbox.sandbox_id
        stack.enter_context(running_envd(folder, address=running.address))
        self._envds[sandbox.sandbox_id] = stack
        initialise(
            running.address,
            access_token=sandbox.access_token,
            environment={**sandbox.environment, "E2B_SANDBOX_ID": sandbox.sandbox_id},
            default_user=sandbox.default_user,
            timeout_s=PATIENCE_S,
            died=threading.Event(),
        )
        return running

    def kill(self, sandbox_id: str) -> None:
        super().kill(sandbox_id)
        self._envds.pop(sandbox_id).close()

    def close(self) -> None:
        """Ends what still runs."""
        for sandbox_id in tuple(self._envds):
            self._envds.pop(sandbox_id).close()


@dataclass(frozen=True, kw_only=True)
class EnvdService:
    """Addresses of the running service; `api` is what is behind them."""

    api_url: str
    sandbox_url: str
    key: str
    api: ApiService


@contextlib.contextmanager
def envd_service(folder: Path) -> Iterator[EnvdService]:
    """The service on free loopback ports, its files in `folder`. Needs root and nginx."""
    node = EnvdNode(folder / "envds")
    (folder / "envds").mkdir()
    with (
        contextlib.closing(node),
        api_service(folder, node=node) as api,
        listening(api.app) as plain_api,
        listening(api.route_app) as route,
        _nginx(folder / "api", lambda address: _API % (address, plain_api)) as address,
        _nginx(folder / "data", lambda address: _data_plane(folder, address, route)) as data_plane,
    ):
        yield EnvdService(
            api_url=f"http://{address}",
            sandbox_url=f"http://{data_plane}",
            key=api.key,
            api=api,
        )


# wsgiref's server cannot read chunked bodies, which the JavaScript SDKs send; nginx gives each a
# length. gunicorn, which stands there in a real service, needs no such help.
_API = """\
daemon off;
error_log stderr crit;
events {}
http {
  access_log off;
  server {
    listen %s;
    location / { proxy_pass http://%s; }
  }
}
"""


def _data_plane(folder: Path, address: str, route: str) -> str:
    user = "root" if os.geteuid() == 0 else ""
    plan = NginxPlan(listen=address, route_socket="ROUTE", folder=str(folder / "data"), user=user)
    return render(plan).replace("unix:ROUTE", route)


@contextlib.contextmanager
def _nginx(folder: Path, configuration: Callable[[str], str]) -> Iterator[str]:
    """An nginx with its files in `folder`; the address it listens on."""
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    config = folder / "nginx.conf"
    config.write_text(configuration(address))
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert nginx, "needs nginx; install nginx-light"
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(config)])
    try:
        wait_until(lambda: _answers(address), "nginx", PATIENCE_S)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, envd_service(Path(folder)) as service:
        variables = {
            "VMCELL_API_URL": service.api_url,
            "VMCELL_SANDBOX_URL": service.sandbox_url,
            "E2B_API_KEY": service.key,
        }
        done = subprocess.run(sys.argv[1:], env={**os.environ, **variables}, check=False)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
