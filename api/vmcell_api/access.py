"""Who asks: the API key of a request, turned into its team.

Keys come as `X-API-KEY` or, for other clients, as `Authorization: Bearer`.
"""

from __future__ import annotations

import falcon

from vmcell_api.identifiers import API_KEY, hash_api_key
from vmcell_api.store.records import Store
from vmcell_protos.errors import CallerError

OPEN_PATHS = ("/health",)
# Links for uploads carry their own permission; SDKs send no key with them.
OPEN_PREFIX = "/vmcell/uploads/"


class KeyCheck:
    """Falcon middleware: `req.context.team` is set, or the request ends with 401."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Checks the key of every request but preflights and health checks."""
        if req.method == "OPTIONS" or req.path in OPEN_PATHS:
            return
        if req.path.startswith(OPEN_PREFIX):
            return
        key = req.get_header("X-API-KEY") or _bearer(req.get_header("Authorization") or "")
        if not key:
            raise CallerError("no API key: send it in the header X-API-KEY", code="unauthenticated")
        team = self._store.team_of_key(hash_api_key(key)) if API_KEY.fullmatch(key) else None
        if team is None:
            raise CallerError(
                "the API key is not valid; make one with `python -m vmcell_api.keys create`",
                code="unauthenticated",
            )
        req.context.team = team


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
