"""The route application under gunicorn, on a unix socket: `python -m vmcell_api.route_server`.

One worker with threads: it waits for noded and the store, and counts signature tries in memory.
"""

from __future__ import annotations

import os
import pwd
import sys

import falcon

from vmcell_api import logs
from vmcell_api.config import ApiConfig, load_config
from vmcell_api.node_client import NodeClient
from vmcell_api.route_app import create_route_app
from vmcell_api.store.database import check_version, open_engine
from vmcell_api.store.records import Store
from vmcell_api.web_server import WebServer, serve
from vmcell_protos.errors import HostError, VmcellError


def make_app(config: ApiConfig) -> falcon.App:
    """The application of the worker; store and node live as long as the process."""
    node = NodeClient(config.node_socket, create_timeout_s=30.0)
    return create_route_app(Store(open_engine(config.database_url)), node, config.domain)


def nginx_gid(user: str) -> int:
    """The group of nginx's user, who may dial the socket; raises HostError."""
    try:
        return pwd.getpwnam(user).pw_gid
    except KeyError as error:
        raise HostError(
            f"nginx_user {user!r} does not exist; name an existing user in api.toml"
        ) from error


def serve_routes(config: ApiConfig) -> int:
    """Serves until a signal ends the process; answers its exit status."""
    logs.set_up("router", config.log_format)
    try:
        gid = nginx_gid(config.nginx_user) if os.geteuid() == 0 else None
        engine = open_engine(config.database_url)
        check_version(engine)
        engine.dispose()
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api.route_server: {error}\n")
        return 1
    server = WebServer(
        name="vmcell-route",
        bind=f"unix:{config.route_socket}",
        workers=1,
        threads=config.threads,
        uid=config.api_uid,
        gid=gid,
    )
    serve(server, lambda: make_app(config))
    return 0


def main() -> int:
    """The command; answers its exit status."""
    try:
        return serve_routes(load_config())
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api.route_server: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
