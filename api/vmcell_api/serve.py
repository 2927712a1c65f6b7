"""The whole service in the foreground: noded, API, router, server of volume files, nginx.

`python -m vmcell_api.serve` (or `vmcell serve`) starts them in this order, passes their logs on,
starts one again that ends by itself, and ends all of them on SIGTERM or SIGINT, or when one ends
again and again. SIGHUP has nginx read its certificate anew. Sandboxes go on without the service;
their streams need nginx alone, which is left to another service with `--no-nginx`.

The four Python processes are forked from this one, so their imports are paid for once, and noded,
which needs none of the web's, makes its slots while this one imports these and migrates the store.
Nothing here may start a thread or a gRPC channel, because a fork may come at any time.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from types import FrameType

import vmcell_api.node.__main__ as noded
from vmcell_api import logs
from vmcell_api.child_processes import execute, fork
from vmcell_api.config import ApiConfig, load_config
from vmcell_api.nginx_files import write_configuration
from vmcell_api.supervision import Part, Supervised
from vmcell_protos.errors import HostError, VmcellError

log = logging.getLogger("vmcell.serve")

READY_TIMEOUT_S = 120
POLL_S = 0.05


class Service:
    """The parts; `stop()` is idempotent and ends them in reverse order."""

    def __init__(self, config: ApiConfig, *, with_nginx: bool) -> None:
        self._config = config
        self._with_nginx = with_nginx
        self._supervised: list[Supervised] = []
        self._parts: list[Part] = []
        self.ending = False
        self.reloading = False

    def start(self) -> None:
        """Starts everything; returns when all of it listens. Raises HostError."""
        self._check_places()
        self._add(_noded(self._config))
        for part in _web_parts(self._config):
            self._add(part)
        if self._with_nginx:
            self._add(_nginx(self._config))
        for part in self._parts:
            self._wait_for(part)

    def watch(self) -> None:
        """Returns when `ending` is set; HostError when a part ends more often than it may."""
        while not self.ending:
            if self.reloading:
                self.reloading = False
                if self._with_nginx:
                    self._supervised[-1].signal(signal.SIGHUP)
            self._attend()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends the parts, the last started first."""
        for supervised in reversed(self._supervised):
            supervised.stop()
        self._supervised = []

    def _add(self, part: Part) -> None:
        self._parts.append(part)
        self._supervised.append(Supervised(part, _say))

    def _check_places(self) -> None:
        """A place that another has would look as if our part listened there."""
        config = self._config
        names = ["api_bind", "volume_bind"]
        if self._with_nginx:
            names += ["data_bind", *(["tls_bind"] if config.tls_certificate else [])]
        for name in names:
            if _tcp_listens(bind := getattr(config, name)):
                raise HostError(
                    f"{name} {bind} is taken; end what listens there, or set another in api.toml"
                )

    def _attend(self) -> None:
        for supervised in self._supervised:
            supervised.attend()

    def _wait_for(self, part: Part) -> None:
        """A part that ends before it has listened once will not do so later."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.ending and not part.listens():
            ended = next((one for one in self._supervised if not one.is_running), None)
            if ended is not None:
                raise HostError(f"{ended.part.name} ended while it started; see its log above")
            if time.monotonic() > deadline:
                raise HostError(
                    f"{part.name} did not listen within {READY_TIMEOUT_S} s; see its log"
                )
            time.sleep(POLL_S)


def _noded(config: ApiConfig) -> Part:
    return Part(
        name="noded",
        start=lambda: fork("noded", lambda: noded.serve(config)),
        listens=lambda: _unix_listens(config.node_socket),
        leftovers=None,  # shims may be among them
    )


def _web_parts(config: ApiConfig) -> list[Part]:
    import vmcell_api.__main__ as api
    from vmcell_api import route_server, volume_server
    from vmcell_api.store.database import migrate

    migrate(config.database_url, owner_uid=config.api_uid)
    route_server.nginx_gid(config.nginx_user)
    return [
        Part(
            name="the API",
            start=lambda: fork("the API", lambda: api.serve_api(config)),
            listens=lambda: _tcp_listens(config.api_bind),
        ),
        Part(
            name="the router",
            start=lambda: fork("the router", lambda: route_server.serve_routes(config)),
            listens=lambda: _unix_listens(config.route_socket),
        ),
        Part(
            name="the volume server",
            start=lambda: fork("the volume server", lambda: volume_server.serve_volumes(config)),
            listens=lambda: _tcp_listens(config.volume_bind),
        ),
    ]


def _nginx(config: ApiConfig) -> Part:
    command = write_configuration(config)
    return Part(
        name="nginx",
        start=lambda: execute("nginx", command),
        listens=lambda: _tcp_listens(config.data_bind),
        leftovers=signal.SIGQUIT,
    )


def run(config: ApiConfig, *, with_nginx: bool = True) -> None:
    """Serves until a signal comes; raises HostError when a part cannot start or go on."""
    if os.geteuid() != 0:
        raise HostError("the service needs root for noded (containerd, TAPs); run it as root")
    os.umask(0o022)  # nginx's user and the API's pass through the folders made here
    systemd = os.environ.pop("NOTIFY_SOCKET", "")  # gunicorn would speak for the whole
    service = Service(config, with_nginx=with_nginx)

    def end(number: int, frame: FrameType | None) -> None:
        service.ending = True

    def reload(number: int, frame: FrameType | None) -> None:
        service.reloading = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, reload)
    try:
        service.start()
        if not service.ending:
            _say(
                f"API on http://{config.api_bind}, sandboxes on http://{config.data_bind}, "
                f"volume files on http://{config.volume_bind}"
            )
            if config.tls_certificate:
                _say(f"both on https://{config.tls_bind} for E2B_DOMAIN={config.domain}")
            _tell_systemd(systemd, "READY=1")
        service.watch()
    finally:
        service.stop()
    _say("stopped")


def _unix_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def _tcp_listens(bind: str) -> bool:
    address, _, port = bind.rpartition(":")
    family = socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(address, address.strip("[]"))
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        return probe.connect_ex((host, int(port))) == 0


def _tell_systemd(path: str, word: str) -> None:
    """sd_notify(3); nothing where nobody asked for it."""
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + path[1:] if path.startswith("@") else path)
            notify.send(word.encode())


def _say(sentence: str) -> None:
    log.info("%s", sentence)


def main(arguments: list[str]) -> int:
    """The command; answers its exit status."""
    logs.set_up("vmcell", "text")
    if arguments not in ([], ["--no-nginx"]):
        _say("usage: python -m vmcell_api.serve [--no-nginx]")
        return 2
    try:
        config = load_config()
        logs.set_up("vmcell", config.log_format)
        run(config, with_nginx=not arguments)
    except VmcellError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
