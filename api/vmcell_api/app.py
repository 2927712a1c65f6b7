"""The control plane's WSGI application."""

from __future__ import annotations

import falcon

from vmcell_api import http_errors
from vmcell_api.access import KeyCheck
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import ControlPlane
from vmcell_api.node_client import NodeVerbs
from vmcell_api.resources import Health, Sandbox, Sandboxes
from vmcell_api.store.records import Store
from vmcell_api.volume_control import VolumeControl
from vmcell_api.volume_routes import Volume, Volumes
from vmcell_api.volumes.token import VolumeTokens

EXPOSED_HEADERS = ["X-Next-Token", "X-Total-Running"]


def create_app(
    store: Store, node: NodeVerbs, config: ApiConfig, *, volume_tokens: VolumeTokens
) -> falcon.App:
    """The application; store and node stay the caller's."""
    app: falcon.App = falcon.App()
    app.add_middleware(falcon.CORSMiddleware(allow_origins="*", expose_headers=EXPOSED_HEADERS))
    app.add_middleware(KeyCheck(store))
    app.req_options.strip_url_path_trailing_slash = True
    http_errors.install(app)
    volumes = VolumeControl(store, node, volume_tokens, limit=config.volumes_per_team)
    app.add_route("/volumes", Volumes(volumes, config.domain))
    app.add_route("/volumes/{volume_id}", Volume(volumes, config.domain))
    control = ControlPlane(store, node, config, volumes)
    sandboxes, sandbox = Sandboxes(control, config), Sandbox(control, config)
    app.add_route("/health", Health())
    app.add_route("/sandboxes", sandboxes)
    app.add_route("/v2/sandboxes", sandboxes, suffix="v2")
    app.add_route("/sandboxes/{sandbox_id}", sandbox)
    app.add_route("/sandboxes/{sandbox_id}/timeout", sandbox, suffix="timeout")
    app.add_route("/sandboxes/{sandbox_id}/refreshes", sandbox, suffix="refreshes")
    app.add_route("/sandboxes/{sandbox_id}/connect", sandbox, suffix="connect")
    app.add_route("/v2/sandboxes/{sandbox_id}/connect", sandbox, suffix="connect")
    return app
