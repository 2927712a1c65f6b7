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
from vmcell_api.request_rate import RequestRates
from vmcell_api.route_app import create_route_app
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.tenancy import create_key


@dataclass(frozen=True, kw_only=True)
class ApiService:
    """Both applications, their store and node, and the key of one team."""

    app: falcon.App
    route_app: falcon.App
    store: Store
    node: FakeNode
    config: ApiConfig
    key: str

    def new_key(self, team: str, *scopes: str) -> str:
        """A key of that team, for everything of it unless scopes are named."""
        key, _ = create_key(self.store, self.store.ensure_team(team), scopes=scopes or ("*",))
        return key


@contextlib.contextmanager
def api_service(folder: Path, **settings: object) -> Iterator[ApiService]:
    """A service with a store of its own in `folder`, unless `settings` name one."""
    settings.setdefault("database_url", f"sqlite:///{folder}/store/api.sqlite")
    config = ApiConfig(**settings)  # type: ignore[arg-type]  # test settings
    migrate(config.database_url)
    store = Store(open_engine(config.database_url))
    node, rates = FakeNode(), RequestRates()
    key, _ = create_key(store, store.ensure_team("team-one"), scopes=("*",))
    try:
        yield ApiService(
            app=create_app(store, node, config, rates=rates),
            route_app=create_route_app(store, node, config.domain),
            store=store,
            node=node,
            config=config,
            key=key,
        )
    finally:
        rates.close()
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
