"""The API's WSGI applications around a fake node, in process or on a loopback port."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import falcon
from fake_builder import FakeBuilder
from fake_node import FakeNode

from vmcell_api.__main__ import make_app
from vmcell_api.app import create_app
from vmcell_api.config import ApiConfig
from vmcell_api.request_rate import RequestRates
from vmcell_api.route_app import create_route_app
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.tenancy import create_key
from vmcell_api.volume_content import create_content_app
from vmcell_api.volumes.files import Volumes
from vmcell_api.volumes.folders import OWNER, VolumeFolders
from vmcell_api.volumes.token import load_tokens


@dataclass(frozen=True, kw_only=True)
class ApiService:
    """The applications, their store and node, and the key of one team."""

    app: falcon.App
    route_app: falcon.App
    content_app: falcon.App
    store: Store
    node: FakeNode
    builder: FakeBuilder
    config: ApiConfig
    key: str

    def new_key(self, team: str, *scopes: str) -> str:
        """A key of that team, for everything of it unless scopes are named."""
        key, _ = create_key(self.store, self.store.ensure_team(team), scopes=scopes or ("*",))
        return key


@contextlib.contextmanager
def api_service(
    folder: Path, *, node: FakeNode | None = None, **settings: object
) -> Iterator[ApiService]:
    """A service with a store of its own in `folder`, unless `settings` name one, and a node that
    only pretends by default."""
    settings.setdefault("database_url", f"sqlite:///{folder}/store/api.sqlite")
    settings.setdefault("upload_dir", f"{folder}/uploads")
    settings.setdefault("requests_per_s", 100_000)
    settings.setdefault("volumes_dir", f"{folder}/volumes")
    config = ApiConfig(**settings)  # type: ignore[arg-type]  # test settings
    migrate(config.database_url)
    store = Store(open_engine(config.database_url))
    node, builder = node or FakeNode(volumes_dir=config.volumes_dir), FakeBuilder()
    rates = RequestRates()
    key, _ = create_key(store, store.ensure_team("team-one"), scopes=("*",))
    folders = VolumeFolders(config.volumes_dir)
    folders.prepare()
    tokens = load_tokens(folders.key_path)
    owner = OWNER if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    volumes = Volumes(config.volumes_dir, owner)
    try:
        yield ApiService(
            app=create_app(store, node, config, volume_tokens=tokens, builds=builder, rates=rates),
            content_app=create_content_app(volumes, tokens),
            route_app=create_route_app(store, node, config.domain),
            store=store,
            node=node,
            builder=builder,
            config=config,
            key=key,
        )
    finally:
        volumes.close()
        rates.close()
        store.close()


def app_of(config: ApiConfig) -> falcon.App:
    """The application as a worker of the API has it, on the node that `config` names."""
    folders = VolumeFolders(config.volumes_dir)
    folders.prepare()
    return make_app(config, RequestRates(), load_tokens(folders.key_path))


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def get_environ(self) -> dict[str, object]:
        # As gunicorn does: the request's target as it was sent.
        return {**super().get_environ(), "RAW_URI": self.path}

    def parse_request(self) -> bool:
        """Takes chunked bodies, which JavaScript sends and wsgiref does not know."""
        if not super().parse_request():
            return False
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(self._chunks())
            del self.headers["Transfer-Encoding"]
            self.headers["Content-Length"] = str(len(body))
            self.rfile = io.BytesIO(body)
        return True

    def _chunks(self) -> Iterator[bytes]:
        while length := int(self.rfile.readline(100), 16):
            yield self.rfile.read(length)
            self.rfile.readline(100)
        self.rfile.readline(100)

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
