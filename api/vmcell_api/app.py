"""The control plane's WSGI application."""

from __future__ import annotations

import falcon

from vmcell_api import http_errors, template_routes
from vmcell_api.access import KeyCheck
from vmcell_api.build_client import BuildClient, BuildVerbs
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import ControlPlane
from vmcell_api.encoded_paths import EncodedPaths
from vmcell_api.node_client import NodeVerbs
from vmcell_api.resources import Health, Sandbox, Sandboxes
from vmcell_api.store.records import Store
from vmcell_api.template_plane import TemplatePlane
from vmcell_api.upload_store import UploadStore

EXPOSED_HEADERS = ["X-Next-Token", "X-Total-Running"]


def create_app(
    store: Store, node: NodeVerbs, config: ApiConfig, builds: BuildVerbs | None = None
) -> falcon.App:
    """The application; store, node and builds (noded's own unless given) stay the caller's."""
    app: falcon.App = falcon.App()
    app.add_middleware(falcon.CORSMiddleware(allow_origins="*", expose_headers=EXPOSED_HEADERS))
    app.add_middleware(EncodedPaths())
    app.add_middleware(KeyCheck(store))
    app.req_options.strip_url_path_trailing_slash = True
    http_errors.install(app)
    uploads = UploadStore(config.upload_dir, limit_mib=config.max_upload_mib)
    templates = TemplatePlane(store, builds or BuildClient(config.node_socket), uploads)
    template_routes.add_routes(app, templates, uploads, config)
    control = ControlPlane(store, node, config, templates)
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
