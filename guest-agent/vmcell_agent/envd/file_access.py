"""Who may use `/files`, and which file is meant: token or signature, user, path."""

from __future__ import annotations

import time

from vmcell_protos.errors import CallerError

from .accounts import Account
from .exchange import HttpError, Request
from .paths import resolve_path
from .settings import Settings
from .wire.headers import basic_user
from .wire.signature import SignatureError, check_signature


def authorise(request: Request, settings: Settings, operation: str) -> None:
    """A matching token, or a signed URL; `operation` is "read" or "write". HttpError 401."""
    token = settings.access_token
    if token is None:
        return
    given = request.headers.get("x-access-token")
    if given is not None:
        if not settings.token_matches(given):
            raise HttpError(401, "access token present in header but does not match")
        return
    try:
        check_signature(request.query, operation, token, time.time())
    except SignatureError as error:
        raise HttpError(401, str(error)) from None


def file_user(request: Request, settings: Settings) -> Account:
    """`username` of the query, else of Basic credentials, else the default user. HttpError 401."""
    try:
        name = request.query.get("username") or basic_user(request.headers.get("authorization"))
    except ValueError as error:
        raise HttpError(401, str(error)) from None
    try:
        return settings.account(name)
    except CallerError:
        raise HttpError(401, f"error looking up user '{name}'") from None


def file_path(text: str, account: Account, settings: Settings) -> str:
    """The absolute path; HttpError 400."""
    if not text:
        raise HttpError(400, "the path query parameter is missing")
    try:
        return resolve_path(text, account.home, settings.default_workdir)
    except CallerError as error:
        raise HttpError(400, str(error)) from None
