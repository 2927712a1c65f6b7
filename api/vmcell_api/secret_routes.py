"""`/secrets`, refused by name: E2B's egress proxy writes them into requests; there is none here.

A secret never enters a guest, so one that is stored and written nowhere would be a promise that
nothing keeps. The routes are those of E2B's SDK 2.63: `GET` and `POST` on both paths, `DELETE`.
"""

from __future__ import annotations

from typing import NoReturn

import falcon

from vmcell_protos.errors import CallerError


class Secrets:
    """`/secrets`: list and create."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Refused."""
        _refuse()

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Refused, its body unread."""
        _refuse()


class Secret:
    """`/secrets/{secret_id}`: look, write a new version, delete."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, secret_id: str) -> None:
        """Refused."""
        _refuse()

    def on_post(self, req: falcon.Request, resp: falcon.Response, secret_id: str) -> None:
        """Refused, its body unread."""
        _refuse()

    def on_delete(self, req: falcon.Request, resp: falcon.Response, secret_id: str) -> None:
        """Refused."""
        _refuse()


def _refuse() -> NoReturn:
    raise CallerError(
        "this server does not have secrets: they are for network rules that rewrite requests, "
        "which it does not have; hand the value to a sandbox in envVars",
        code="unimplemented",
    )


def add_secret_routes(app: falcon.App) -> None:
    """Adds them to `app`."""
    app.add_route("/secrets", Secrets())
    app.add_route("/secrets/{secret_id}", Secret())
