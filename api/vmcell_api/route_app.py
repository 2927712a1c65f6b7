"""The application behind nginx's `auth_request`: where a data-plane request goes, or why nowhere.

A request wakes a paused sandbox that says so; of many at once one does, and all wait for it.

It listens on a unix socket that only nginx may dial. `/route` answers 200 with the upstream's
address, or 403 with the refusal as a header; nginx then asks `/refused` with that header (or
`/unreachable`, when the upstream did not take the connection) for the answer that the client gets.
`python -m vmcell_api.route_server` runs it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import OrderedDict
from concurrent.futures import Future

import falcon

from vmcell_api import data_route, http_errors
from vmcell_api.data_route import ENVD_PORT, Refusal, Request, Signed, Target
from vmcell_api.node_channel import NodeUnreachable
from vmcell_api.node_client import RUNNING, NodeVerbs, RunningSandbox
from vmcell_api.refusal_answers import allow_preflight, write_refusal
from vmcell_api.signature_search import SignatureSearch
from vmcell_api.store.records import Store
from vmcell_protos.errors import CallerError, VmcellError

log = logging.getLogger("vmcell.route")

PROBE_TIMEOUT_S = 1.0
KNOWN_TOKENS = 4096


class Router:
    """Finds the running sandbox of a request, which may have to be woken; thread-safe."""

    def __init__(self, store: Store, node: NodeVerbs, domain: str) -> None:
        self._store = store
        self._node = node
        self._domain = domain
        self._search = SignatureSearch(self._live_tokens)
        self._tokens = _TrafficTokens(store)
        self._wakes = _Wakes(node)

    def find(self, request: Request, client: str) -> tuple[RunningSandbox, int] | Refusal:
        """The sandbox and port, or the refusal the client gets."""
        named = data_route.find_target(request, self._domain)
        target = self._search.find(named, client) if isinstance(named, Signed) else named
        if isinstance(target, Refusal):
            return target
        running = self._running(target.sandbox_id)
        if running is None and isinstance(named, Signed):
            self._search.forget(named)
            return Refusal(status=401, message="invalid signature")
        token = "" if target.port == ENVD_PORT else self._tokens.of(target.sandbox_id)
        if running is None or token is None:
            return _not_found(target)
        refusal = data_route.check_traffic_token(request, target, token)
        if refusal is not None:
            return refusal
        if running.state != RUNNING:
            woken = self._wake(running, target)
            return woken if isinstance(woken, Refusal) else (woken, target.port)
        return running, target.port

    def _wake(self, sandbox: RunningSandbox, target: Target) -> RunningSandbox | Refusal:
        if not sandbox.auto_resume:
            return _not_found(target)
        try:
            return self._wakes.wake(sandbox.sandbox_id)
        except NodeUnreachable:
            raise
        except VmcellError as error:
            if error.code in ("not_found", "failed_precondition"):
                return _not_found(target)
            log.error("sandbox %s was not woken: %s", sandbox.sandbox_id, error)
            if error.code in ("resource_exhausted", "aborted"):
                words = "The sandbox is paused and the node has no room for it now; try again"
                return Refusal(status=503, message=words, sandbox_id=sandbox.sandbox_id)
            words = "The sandbox is paused and could not be resumed"
            return Refusal(status=502, message=words, sandbox_id=sandbox.sandbox_id)

    def _running(self, sandbox_id: str) -> RunningSandbox | None:
        try:
            return self._node.get(sandbox_id)
        except CallerError as error:
            if error.code != "not_found":
                raise
            return None

    def _live_tokens(self) -> dict[str, str]:
        live = {
            sandbox.sandbox_id
            for sandbox in self._node.list()
            if sandbox.state == RUNNING or sandbox.auto_resume
        }
        return {key: token for key, token in self._store.tokens().items() if key in live}


class _Wakes:
    """Resumes sandboxes by request, each once however many requests wait for it."""

    def __init__(self, node: NodeVerbs) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._running: dict[str, Future[RunningSandbox]] = {}

    def wake(self, sandbox_id: str) -> RunningSandbox:
        """The sandbox, running; raises what the node does."""
        with self._lock:
            present = self._running.get(sandbox_id)
            own = None if present else Future[RunningSandbox]()
            if own is not None:
                self._running[sandbox_id] = own
        if own is None:
            assert present is not None
            return present.result()
        try:
            woken, _ = self._node.resume(sandbox_id, 0, by_request=True)
            own.set_result(woken)
            return woken
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[sandbox_id]


class _TrafficTokens:
    """The store's traffic tokens, each read once: a sandbox keeps its own for life."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: OrderedDict[str, str] = OrderedDict()

    def of(self, sandbox_id: str) -> str | None:
        """The token, "" for none; None when the store knows no such sandbox."""
        with self._lock:
            if sandbox_id in self._known:
                self._known.move_to_end(sandbox_id)
                return self._known[sandbox_id]
        token = self._store.traffic_token(sandbox_id)
        if token is not None:
            with self._lock:
                self._known[sandbox_id] = token
                if len(self._known) > KNOWN_TOKENS:
                    self._known.popitem(last=False)
        return token


class Route:
    """The three questions of nginx."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def on_get_route(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Where to: 200 with `X-Vmcell-Upstream`, or 403 with `X-Vmcell-Refusal`."""
        found = self._router.find(_request(req), _client(req))
        if isinstance(found, Refusal):
            resp.status = 403
            resp.set_header("X-Vmcell-Refusal", found.as_header())
            return
        running, port = found
        resp.set_header("X-Vmcell-Upstream", f"{running.address}:{port}")

    def on_get_refused(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The answer to a request that `/route` refused."""
        if _is_preflight(req):
            allow_preflight(req, resp)
            return
        refusal = data_route.refusal_from_header(req.get_header("X-Vmcell-Refusal") or "")
        if refusal is None:
            raise ValueError("nginx asked for a refusal that the router did not give")
        write_refusal(req, resp, refusal)

    def on_get_unreachable(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The answer when the guest did not take the connection, or broke it."""
        found = self._router.find(_request(req), _client(req))
        if isinstance(found, Refusal):
            write_refusal(req, resp, found)
            return
        running, port = found
        if _is_open(running.address, port):
            message = "The sandbox is running but the port gave no valid answer"
        else:
            message = "The sandbox is running but port is not open"
        write_refusal(
            req,
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
        traffic_token=req.get_header("E2b-Traffic-Access-Token") or "",
    )


def _client(req: falcon.Request) -> str:
    return req.get_header("X-Original-Client") or ""


def _is_preflight(req: falcon.Request) -> bool:
    is_options = req.get_header("X-Original-Method") == "OPTIONS"
    return is_options and bool(req.get_header("Access-Control-Request-Method"))


def _not_found(target: Target) -> Refusal:
    return Refusal(status=502, message="The sandbox was not found", sandbox_id=target.sandbox_id)


def _is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
