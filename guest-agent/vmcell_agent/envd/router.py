"""Which endpoint serves a request, and whether the request may reach it."""

from __future__ import annotations

from collections.abc import Callable

from .compose import compose_reader
from .cors import is_preflight, preflight_headers, response_headers
from .download import Download
from .exchange import BodyReader, Exchange, HttpError, WholeBody
from .filesystem_service import FilesystemService
from .initialise import SetClock, initialise_reader
from .loop import Loop
from .metrics import Metrics
from .process_service import ProcessService
from .process_table import ProcessTable
from .rpc import Method, open_call
from .settings import Settings
from .upload import Upload
from .watch_service import WatchService

_UNAUTHORISED = (
    "unauthorized access, please provide a valid access token or method signing if supported"
)
# Bodies of requests that need none are read and dropped up to here.
_MAX_IGNORED_BYTES = 1024 * 1024

Endpoint = Callable[[Exchange], BodyReader]


class Router:
    """An application for connections: one exchange in, the reader of its body out.

    `layer` serves GET /layer; only the builder has it.
    """

    def __init__(
        self,
        loop: Loop,
        settings: Settings,
        table: ProcessTable,
        clock: SetClock,
        layer: Endpoint | None = None,
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._metrics = Metrics()
        self._journal = table.journal
        self._clock = clock
        self._calls: dict[str, Method] = {}
        for service, methods in (
            ("process.Process", ProcessService(table, settings).methods),
            ("filesystem.Filesystem", FilesystemService(loop, settings).methods),
            ("filesystem.Filesystem", WatchService(loop, settings).methods),
        ):
            for name, method in methods.items():
                self._calls[f"/{service}/{name}"] = method
        # (methods allowed, needs the token, endpoint) by path.
        self._endpoints: dict[str, dict[str, tuple[bool, Endpoint]]] = {
            "/health": {"GET": (False, self._health)},
            "/init": {"POST": (False, self._init)},
            "/files": {"GET": (False, self._download), "POST": (False, self._upload)},
            "/files/compose": {"POST": (True, self._compose)},
            "/envs": {"GET": (True, self._envs)},
            "/metrics": {"GET": (True, self._read_metrics)},
            "/logs": {"GET": (True, self._read_logs)},
        }
        if layer is not None:
            self._endpoints["/layer"] = {"GET": (True, layer)}

    def __call__(self, exchange: Exchange) -> BodyReader:
        request = exchange.request
        if is_preflight(request.method, request.headers):
            exchange.reply(204, preflight_headers(request.headers))
            return _ignored(lambda: None)
        exchange.extra_headers = response_headers(request.headers)
        call = self._calls.get(request.path)
        if call is not None:
            self._need_token(exchange)
            return open_call(call, exchange, self._loop, self._settings)
        methods = self._endpoints.get(request.path)
        if methods is None:
            self._need_token(exchange)
            raise HttpError(404, f"no endpoint {request.path!r}")
        wanted = "GET" if request.method == "HEAD" else request.method
        if wanted not in methods:
            self._need_token(exchange)
            raise HttpError(
                405,
                f"method {request.method} is not allowed here",
                [("Allow", ", ".join(methods))],
            )
        guarded, endpoint = methods[wanted]
        if guarded:
            self._need_token(exchange)
        return endpoint(exchange)

    def _need_token(self, exchange: Exchange) -> None:
        if not self._settings.token_matches(exchange.request.headers.get("x-access-token")):
            raise HttpError(401, _UNAUTHORISED)

    def _health(self, exchange: Exchange) -> BodyReader:
        return _ignored(lambda: exchange.reply(204, [("Cache-Control", "no-store")]))

    def _init(self, exchange: Exchange) -> BodyReader:
        return initialise_reader(exchange, self._settings, self._clock)

    def _download(self, exchange: Exchange) -> BodyReader:
        return Download(exchange, self._settings)

    def _upload(self, exchange: Exchange) -> BodyReader:
        return Upload(exchange, self._settings)

    def _compose(self, exchange: Exchange) -> BodyReader:
        return compose_reader(exchange, self._loop, self._settings)

    def _envs(self, exchange: Exchange) -> BodyReader:
        return _ignored(lambda: exchange.reply_json(200, self._settings.global_environment))

    def _read_metrics(self, exchange: Exchange) -> BodyReader:
        return _ignored(
            lambda: exchange.reply_json(200, self._metrics.read(), [("Cache-Control", "no-store")])
        )

    def _read_logs(self, exchange: Exchange) -> BodyReader:
        return _ignored(
            lambda: exchange.reply_json(200, self._journal.read(), [("Cache-Control", "no-store")])
        )


def _ignored(done: Callable[[], None]) -> BodyReader:
    return WholeBody(_MAX_IGNORED_BYTES, lambda body: done())
