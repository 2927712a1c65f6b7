"""The HTTP routes, E2B's: `/execute`, `/contexts`, `/health`.

Errors are plain text. `/contexts` asks for no token: clients send none there, and the sandbox's
front door has checked the traffic token by then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import Application, RequestHandler

from .client import Client, ClientGone
from .contexts import Contexts
from .kernel import KernelFailed
from .languages import BASH, NoKernel
from .lines import Line, encode
from .requests import RequestError, check_for_shell, parse_context, parse_execute

log = logging.getLogger("vmcell.interpreter")


class TextErrors(RequestHandler):
    """What all routes share: the registry, and errors as one line of text."""

    def initialize(self, contexts: Contexts) -> None:
        self.contexts = contexts

    def set_default_headers(self) -> None:
        """Browsers use the JavaScript client from other origins."""
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Allow-Methods", "GET, POST, DELETE")
        self.set_header("Access-Control-Allow-Headers", "*")
        self.clear_header("Server")

    def options(self, *parts: str) -> None:
        self.set_status(204)

    def write_error(self, status_code: int, **details: Any) -> None:
        error = details.get("exc_info", (None, None))[1]
        if isinstance(error, NoKernel | KernelFailed | RequestError):
            text = str(error)
        else:
            text = self._reason
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(text)

    def send_error(self, status_code: int = 500, **details: Any) -> None:
        error = details.get("exc_info", (None, None))[1]
        if isinstance(error, RequestError):
            status_code = error.status
        if isinstance(error, NoKernel):
            # the JavaScript client shows the status line and no body
            details["reason"] = "Language Not Installed"
        super().send_error(status_code, **details)

    def log_exception(self, *details: Any) -> None:
        """A client's mistakes are not the server's news."""
        if not isinstance(details[1], NoKernel | KernelFailed | RequestError | StreamClosedError):
            super().log_exception(*details)

    def answer(self, value: object) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value))


class Health(TextErrors):
    """Says that the server serves; kernels come when they are needed."""

    def get(self) -> None:
        self.answer("OK")


class AllContexts(TextErrors):
    """The collection."""

    def get(self) -> None:
        self.answer([context.described() for context in self.contexts.all()])

    async def post(self) -> None:
        context = await self.contexts.create(parse_context(self.request.body))
        self.answer(context.described())


class OneContext(TextErrors):
    """One of them."""

    async def delete(self, context_id: str) -> None:
        await self.contexts.remove(context_id)
        self.answer(None)


class Restart(TextErrors):
    """The same id, without the state."""

    async def post(self, context_id: str) -> None:
        await self.contexts.named(context_id).restart()
        self.answer(None)


class Execute(TextErrors):
    """A run: a line for all that happens, as it happens."""

    client: Client | None = None

    async def post(self) -> None:
        request = parse_execute(self.request.body)
        context = self.contexts.for_run(request)
        if context.language == BASH:
            check_for_shell(request)
        self.client = Client(self._send)
        self.set_header("Content-Type", "application/x-ndjson")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Accel-Buffering", "no")
        await _until_gone(self.flush())
        try:
            await context.run(request, self.client, self.request.headers.get("X-Access-Token"))
        except ClientGone:
            return
        self.finish()

    def on_connection_close(self) -> None:
        if self.client is not None:
            self.client.gone.set()

    async def _send(self, line: Line) -> None:
        self.write(encode(line))
        await _until_gone(self.flush())


async def _until_gone(call: Awaitable[None]) -> None:
    try:
        await call
    except StreamClosedError as error:
        raise ClientGone from error


def application(contexts: Contexts) -> Application:
    """The routes over `contexts`."""
    settings = {"contexts": contexts}
    return Application(
        [
            ("/health", Health, settings),
            ("/execute", Execute, settings),
            ("/contexts", AllContexts, settings),
            ("/contexts/([^/]+)", OneContext, settings),
            ("/contexts/([^/]+)/restart", Restart, settings),
        ],
        default_handler_class=NotFound,
        default_handler_args=settings,
        # what is wrong with the server is logged as an exception
        log_function=lambda handler: None,
    )


class NotFound(TextErrors):
    """Any other path."""

    def prepare(self) -> None:
        raise RequestError(404, f"no endpoint {self.request.path[:80]!r}")
