"""gunicorn, set up from code: the same for the API and for the route application.

Everything is imported before the workers fork and give up root, so the code itself need not be
readable for the user they become.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import falcon
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

# Longer than the 300 s for which clients keep idle connections.
KEEPALIVE_S = 620
HEADER_BYTES = 32768
HEADER_COUNT = 100


@dataclass(frozen=True, kw_only=True)
class WebServer:
    """`bind` is "address:port" or "unix:/path"; `uid` None: workers stay who they are.

    `read_timeout_s`: how long a thread waits for more of a request that has begun;
    `write_timeout_s`: how long for a client that takes nothing of its answer, 0: without end.
    `confine` is called in each worker before the application is made.
    """

    name: str
    bind: str
    workers: int
    threads: int
    uid: int | None = None
    gid: int | None = None
    umask: int = 0o117
    read_timeout_s: int = 10
    write_timeout_s: int = 0
    confine: Callable[[], None] | None = None


def serve(server: WebServer, make_app: Callable[[], falcon.App]) -> None:
    """Runs until a signal ends the process; `make_app` is called in each worker."""
    _Gunicorn(server, make_app).run()


class _RootLogger(Logger):
    """gunicorn's records through the process's own log; there is no access log of gunicorn's."""

    def setup(self, cfg: object) -> None:
        super().setup(cfg)
        self.error_log.handlers[:] = []
        self.error_log.propagate = True


class _Gunicorn(BaseApplication):
    def __init__(self, server: WebServer, make_app: Callable[[], falcon.App]) -> None:
        self._server = server
        self._make_app = make_app
        super().__init__()

    def load_config(self) -> None:
        server = self._server
        settings: dict[str, object] = {
            "bind": server.bind,
            "proc_name": server.name,
            "worker_class": "gthread",
            "workers": server.workers,
            "threads": server.threads,
            "keepalive": KEEPALIVE_S,
            "limit_request_field_size": HEADER_BYTES,
            "limit_request_fields": HEADER_COUNT,
            "limit_request_line": 8190,
            "umask": server.umask,
            "graceful_timeout": 10,
            "timeout": 120,
            "worker_tmp_dir": "/dev/shm",
            "post_fork": self._after_fork,
            "control_socket_disable": True,
            "logger_class": _RootLogger,
            # No client may say who it is or where the application is mounted.
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
        }
        if server.uid is not None and os.geteuid() == 0:
            settings["user"] = server.uid
            settings["group"] = server.uid if server.gid is None else server.gid
        for name, value in settings.items():
            self.cfg.set(name, value)

        self.cfg.set("when_ready", self._limit_reads)

    def _limit_reads(self, arbiter: Arbiter) -> None:
        """The kernel's limit, which accepted sockets inherit: gunicorn's threads have none."""
        reads = struct.pack("ll", self._server.read_timeout_s, 0)
        writes = struct.pack("ll", self._server.write_timeout_s, 0)
        for listener in arbiter.LISTENERS:
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, reads)
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, writes)

    def _after_fork(self, arbiter: object, worker: object) -> None:
        """gunicorn changes user and group, but leaves root's other groups."""
        if self._server.uid is not None and os.geteuid() == 0:
            os.setgroups([])
        if self._server.confine is not None:
            self._server.confine()

    def load(self) -> falcon.App:
        return self._make_app()
