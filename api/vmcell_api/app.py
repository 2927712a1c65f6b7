"""The control plane's WSGI application."""

from __future__ import annotations

import falcon

from vmcell_api import http_errors
from vmcell_api.access import KeyCheck
from vmcell_api.activity_routes import add_activity_routes
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import LOST_AFTER_MS, ControlPlane
from vmcell_api.create_once import CreateOnce
from vmcell_api.node_client import NodeVerbs
from vmcell_api.resources import Health, Sandbox, Sandboxes
from vmcell_api.snapshot_routes import add_snapshot_routes
from vmcell_api.store.create_keys import CreateKeys
from vmcell_api.store.records import Store

EXPOSED_HEADERS = ["X-Next-Token", "X-Total-Running"]


def create_app(store: Store, node: NodeVerbs, config: ApiConfig) -> falcon.App:
    """The application; store and node stay the caller's."""
    app: falcon.App = falcon.App()
    app.add_middleware(falcon.CORSMiddleware(allow_origins="*", expose_headers=EXPOSED_HEADERS))
    app.add_middleware(KeyCheck(store))
    app.req_options.strip_url_path_trailing_slash = True
    http_errors.install(app)
    control = ControlPlane(store, node, config)
    window_ms = config.start_timeout_s * 1000 + LOST_AFTER_MS
    once = CreateOnce(control, CreateKeys(store), window_ms=window_ms)
    sandboxes, sandbox = Sandboxes(control, once, config), Sandbox(control, config)
    app.add_route("/health", Health())
    app.add_route("/sandboxes", sandboxes)
    app.add_route("/v2/sandboxes", sandboxes, suffix="v2")
    app.add_route("/sandboxes/{sandbox_id}", sandbox)
    app.add_route("/sandboxes/{sandbox_id}/timeout", sandbox, suffix="timeout")
    app.add_route("/sandboxes/{sandbox_id}/refreshes", sandbox, suffix="refreshes")
    app.add_route("/sandboxes/{sandbox_id}/connect", sandbox, suffix="connect")
    app.add_route("/v2/sandboxes/{sandbox_id}/connect", sandbox, suffix="connect")
    app.add_route("/sandboxes/{sandbox_id}/network", sandbox, suffix="network")
    add_snapshot_routes(app, control)
    add_activity_routes(app, control)
    return app
