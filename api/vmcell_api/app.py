"""The control plane's WSGI application."""

from __future__ import annotations

import falcon

from vmcell_api import http_errors, template_routes
from vmcell_api.access import KeyCheck
from vmcell_api.activity_routes import add_activity_routes
from vmcell_api.build_client import BuildClient, BuildVerbs
from vmcell_api.config import ApiConfig
from vmcell_api.control_plane import LOST_AFTER_MS, ControlPlane
from vmcell_api.create_once import CreateOnce
from vmcell_api.encoded_paths import EncodedPaths
from vmcell_api.metrics import Metrics
from vmcell_api.node_client import NodeVerbs
from vmcell_api.operator_resources import add_operator_routes
from vmcell_api.request_bounds import RequestBounds
from vmcell_api.request_rate import RequestRates
from vmcell_api.request_record import RequestRecord
from vmcell_api.resources import Health, Sandbox, Sandboxes
from vmcell_api.secret_routes import add_secret_routes
from vmcell_api.snapshot_catalog import SnapshotCatalog
from vmcell_api.snapshot_plane import SnapshotPlane
from vmcell_api.snapshot_routes import add_snapshot_routes
from vmcell_api.store.api_keys import ApiKeys
from vmcell_api.store.audit import Audit
from vmcell_api.store.create_keys import CreateKeys
from vmcell_api.store.records import Store
from vmcell_api.template_plane import TemplatePlane
from vmcell_api.upload_store import UploadStore
from vmcell_api.volume_control import VolumeControl
from vmcell_api.volume_routes import Volume, Volumes
from vmcell_api.volumes.token import VolumeTokens

EXPOSED_HEADERS = ["X-Next-Token", "X-Total-Running", "X-Request-Id"]


def create_app(
    store: Store,
    node: NodeVerbs,
    config: ApiConfig,
    *,
    volume_tokens: VolumeTokens,
    builds: BuildVerbs | None = None,
    rates: RequestRates | None = None,
    metrics_dir: str = "",
) -> falcon.App:
    """The application; store, node, builds (noded's own unless given) and rates stay the caller's.

    `rates` and `metrics_dir` are what all workers share; without them this one counts alone.
    """
    app: falcon.App = falcon.App()
    audit = Audit(store.engine, keep_days=config.audit_days, keep_rows=config.audit_rows)
    metrics = Metrics(node, metrics_dir)
    app.add_middleware(falcon.CORSMiddleware(allow_origins="*", expose_headers=EXPOSED_HEADERS))
    app.add_middleware(RequestRecord(audit, metrics))
    app.add_middleware(EncodedPaths())
    app.add_middleware(RequestBounds())
    app.add_middleware(KeyCheck(ApiKeys(store.engine), rates or RequestRates(), config))
    app.req_options.strip_url_path_trailing_slash = True
    http_errors.install(app)
    uploads = UploadStore(config.upload_dir, limit_mib=config.max_upload_mib)
    templates = TemplatePlane(store, builds or BuildClient(config.node_socket), uploads)
    volumes = VolumeControl(store, node, volume_tokens, limit=config.volumes_per_team)
    app.add_route("/volumes", Volumes(volumes, config.domain))
    app.add_route("/volumes/{volume_id}", Volume(volumes, config.domain))
    catalog = SnapshotCatalog(store, node, limit=config.snapshots_per_team)
    control = ControlPlane(store, node, config, templates, volumes, catalog)
    snapshots = SnapshotPlane(control, catalog, node, config)
    template_routes.add_routes(app, templates, uploads, config, snapshots.delete)
    window_ms = config.start_timeout_s * 1000 + LOST_AFTER_MS
    once = CreateOnce(control, CreateKeys(store), window_ms=window_ms)
    sandboxes, sandbox = Sandboxes(control, once, config), Sandbox(control, config)
    app.add_route("/health", Health())
    app.add_route("/sandboxes", sandboxes)
    app.add_route("/v2/sandboxes", sandboxes, suffix="v2")
    app.add_route("/sandboxes/{sandbox_id}", sandbox)
    app.add_route("/sandboxes/{sandbox_id}/timeout", sandbox, suffix="timeout")
    app.add_route("/sandboxes/{sandbox_id}/refreshes", sandbox, suffix="refreshes")
    app.add_route("/sandboxes/{sandbox_id}/network", sandbox, suffix="network")
    add_snapshot_routes(app, snapshots, config)
    add_activity_routes(app, control)
    add_secret_routes(app)
    add_operator_routes(app, store, node, audit, metrics)
    return app
