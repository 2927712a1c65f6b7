"""The application behind nginx's `auth_request`: where a data-plane request goes, or why nowhere.

It listens on a unix socket that only nginx may dial. `/route` answers 200 with the upstream's
address or 403; nginx then asks `/refused` (or `/unreachable`, when the upstream did not take the
connection) for the answer the client gets. `python -m vmcell_api.route_server` runs it.
"""

from __future__ import annotations

import json
import socket
import threading
import time

import falcon

from vmcell_api import data_route, http_errors
from vmcell_api.data_route import ENVD_PORT, Refusal, Request, Signed, Target
from vmcell_api.node_client import NodeVerbs, RunningSandbox
from vmcell_api.store.records import Store
from vmcell_protos.errors import CallerError

PROBE_TIMEOUT_S = 1.0
TRIES_PER_S = 10
MAX_CLIENTS = 4096


class TryLimit:
    """At most 10 signature tries a second for one client address; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._second = 0
        self._tries: dict[str, int] = {}

    def take(self, client: str) -> bool:
        """Counts one try; False when the client had its share of this second."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second or len(self._tries) > MAX_CLIENTS:
                self._second, self._tries = second, {}
            self._tries[client] = self._tries.get(client, 0) + 1
            return self._tries[client] <= TRIES_PER_S


class Router:
    """Finds the running sandbox of a request; thread-safe."""

    def __init__(self, store: Store, node: NodeVerbs, domain: str) -> None:
        self._store = store
        self._node = node
        self._domain = domain
        self._limit = TryLimit()

    def find(self, request: Request, client: str) -> tuple[RunningSandbox, int] | Refusal:
        """The sandbox and port, or the refusal the client gets."""
        target = data_route.find_target(request, self._domain)
        if isinstance(target, Signed):
            target = self._by_signature(target, client)
        if isinstance(target, Refusal):
            return target
        try:
            return self._node.get(target.sandbox_id), target.port
        except CallerError as error:
            if error.code != "not_found":
                raise
            return Refusal(
                status=502,
                message="The sandbox was not found",
                sandbox_id=target.sandbox_id,
            )

    def _by_signature(self, signed: Signed, client: str) -> Target | Refusal:
        if not self._limit.take(client):
            return Refusal(status=429, message="too many signatures tried; wait a second")
        live = {running.sandbox_id for running in self._node.list()}
        tokens = {key: token for key, token in self._store.tokens().items() if key in live}
        sandbox_id = data_route.signing_token(signed, tokens)
        if sandbox_id is None:
            return Refusal(status=401, message="invalid signature")
        return Target(sandbox_id=sandbox_id, port=ENVD_PORT)


class Route:
    """The three questions of nginx."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def on_get_route(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Where to: 200 with `X-Vmcell-Upstream`, or 403."""
        found = self._router.find(_request(req), _client(req))
        if isinstance(found, Refusal):
            resp.status = 403
            return
        running, port = found
        resp.set_header("X-Vmcell-Upstream", f"{running.address}:{port}")

    def on_get_refused(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The answer to a request that `/route` refused."""
        if _is_preflight(req):
            _allow_preflight(req, resp)
            return
        found = self._router.find(_request(req), _client(req))
        if isinstance(found, Refusal):
            _write(resp, found)
        else:  # it came up between the two questions
            _write(resp, Refusal(status=503, message="the sandbox has just started; try again"))

    def on_get_unreachable(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The answer when the guest did not take the connection, or broke it."""
        found = self._router.find(_request(req), _client(req))
        if isinstance(found, Refusal):
            _write(resp, found)
            return
        running, port = found
        if _is_open(running.address, port):
            message = "The sandbox is running but the port gave no valid answer"
        else:
            message = "The sandbox is running but port is not open"
        _write(
            resp,
            Refusal(status=502, message=message, sandbox_id=running.sandbox_id, port=port),
        )


def create_route_app(store: Store, node: NodeVerbs, domain: str) -> falcon.App:
    """The application; store and node stay the caller's."""
    app: falcon.App = falcon.App()
    http_errors.install(app)
    route = Route(Router(store, node, domain))
    for name in ("route", "refused", "unreachable"):
        app.add_route(f"/{name}", route, suffix=name)
    return app


def _request(req: falcon.Request) -> Request:
    return Request(
        method=req.get_header("X-Original-Method") or "GET",
        host=req.get_header("X-Original-Host") or "",
        uri=req.get_header("X-Original-Uri") or "/",
        id_header=req.get_header("E2b-Sandbox-Id") or "",
        port_header=req.get_header("E2b-Sandbox-Port") or "",
    )


def _client(req: falcon.Request) -> str:
    return req.get_header("X-Original-Client") or ""


def _is_preflight(req: falcon.Request) -> bool:
    """A browser asks before it sends the headers that would name the sandbox."""
    is_options = req.get_header("X-Original-Method") == "OPTIONS"
    return is_options and bool(req.get_header("Access-Control-Request-Method"))


def _allow_preflight(req: falcon.Request, resp: falcon.Response) -> None:
    resp.status = 204
    resp.set_header("Access-Control-Allow-Origin", "*")
    resp.set_header("Access-Control-Allow-Methods", "HEAD, GET, POST, PUT, PATCH, DELETE")
    resp.set_header(
        "Access-Control-Allow-Headers", req.get_header("Access-Control-Request-Headers") or "*"
    )
    resp.set_header("Access-Control-Max-Age", "7200")


def _write(resp: falcon.Response, refusal: Refusal) -> None:
    body: dict[str, object] = {"message": refusal.message, "code": refusal.status}
    if refusal.sandbox_id:
        body["sandboxId"] = refusal.sandbox_id
    if refusal.port:
        body["port"] = refusal.port
    resp.status = refusal.status
    resp.content_type = falcon.MEDIA_JSON
    resp.data = json.dumps(body).encode()
    resp.set_header("Access-Control-Allow-Origin", "*")
    if refusal.status >= 500 and refusal.status != 503:
        resp.set_header("Should-Retry", "false")


def _is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
