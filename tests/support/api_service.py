"""The API's WSGI applications around a fake node, in process or on a loopback port."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import falcon
from fake_node import FakeNode

from vmcell_api.app import create_app
from vmcell_api.config import ApiConfig
from vmcell_api.identifiers import hash_api_key, new_api_key
from vmcell_api.route_app import create_route_app
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store


@dataclass(frozen=True, kw_only=True)
class ApiService:
    """Both applications, their store and node, and the key of one team."""

    app: falcon.App
    route_app: falcon.App
    store: Store
    node: FakeNode
    config: ApiConfig
    key: str

    def new_key(self, team: str) -> str:
        """A key of another team."""
        key = new_api_key()
        self.store.add_key(self.store.ensure_team(team).team_id, hash_api_key(key))
        return key


@contextlib.contextmanager
def api_service(
    folder: Path, *, node: FakeNode | None = None, **settings: object
) -> Iterator[ApiService]:
    """A service with a store of its own in `folder`, and a node that only pretends by default."""
    config = ApiConfig(database_url=f"sqlite:///{folder}/store/api.sqlite", **settings)  # type: ignore[arg-type]  # test settings
    migrate(config.database_url)
    store = Store(open_engine(config.database_url))
    node = node or FakeNode()
    key = new_api_key()
    store.add_key(store.ensure_team("team-one").team_id, hash_api_key(key))
    try:
        yield ApiService(
            app=create_app(store, node, config),
            route_app=create_route_app(store, node, config.domain),
            store=store,
            node=node,
            config=config,
            key=key,
        )
    finally:
        store.close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def listening(application: Callable) -> Iterator[str]:
    """The address of a server that runs `application` on a free loopback port."""
    server = make_server("127.0.0.1", 0, application, server_class=_Server, handler_class=_Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
