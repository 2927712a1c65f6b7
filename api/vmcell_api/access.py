"""Who asks: the API key of a request, turned into its team, its scopes and its limits.

Keys come as `X-API-KEY` or, for other clients, as `Authorization: Bearer`. Each request asks the
store for its key, so what was revoked or changed holds at once in all workers.
"""

from __future__ import annotations

import logging

import falcon

from vmcell_api import logs
from vmcell_api.config import ApiConfig
from vmcell_api.identifiers import API_KEY, hash_api_key
from vmcell_api.request_rate import RequestRates
from vmcell_api.scopes import allows, needed_scope
from vmcell_api.store.api_keys import LAST_USED_STEP_MS, ApiKey, ApiKeys
from vmcell_api.store.records import Team, now_ms
from vmcell_protos.errors import CallerError, HostError

log = logging.getLogger("vmcell.api")

OPEN_PATHS = ("/health", "/openapi.json")
# Links for uploads carry their own permission; SDKs send no key with them.
OPEN_PREFIX = "/vmcell/uploads/"


class KeyCheck:
    """Falcon middleware: `req.context.team` and `.key_id` are set, or the request ends.

    401 without a valid key, 429 over the team's rate, 403 when the key lacks the route's scope.
    """

    def __init__(self, keys: ApiKeys, rates: RequestRates, config: ApiConfig) -> None:
        self._keys = keys
        self._rates = rates
        self._config = config

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Checks the key of every request but preflights, health checks and the API's document."""
        if _is_open(req):
            return
        key = self._key(presented_key(req))
        req.context.team, req.context.key_id, req.context.scopes = key.team, key.key_id, key.scopes
        logs.add_to_request(team_id=key.team.team_id, key_id=key.key_id)
        state = key.state(now_ms())
        # What has ended may use up its own share of the audit, not its team's rate.
        payer = key.team.team_id if state == "active" else key.key_id
        self._rates.take(payer, key.team.requests_per_s or self._config.requests_per_s)
        if state != "active":
            raise CallerError(
                f"the API key {key.key_id} is {state}; ask the operator for another one",
                code="unauthenticated",
            )
        self._note_use(key)

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: object
    ) -> None:
        """Checks the scope that the route needs."""
        if _is_open(req):
            return
        needed = needed_scope(req.method, req.uri_template or "")
        if not allows(req.context.scopes, needed):
            raise CallerError(
                f"the API key {req.context.key_id} has the scopes "
                f"{' '.join(req.context.scopes)}; this call needs {needed}",
                code="permission_denied",
            )

    def _key(self, text: str) -> ApiKey:
        if not text:
            raise CallerError("no API key: send it in the header X-API-KEY", code="unauthenticated")
        key = self._keys.find(hash_api_key(text)) if API_KEY.fullmatch(text) else None
        if key is None:
            raise CallerError(
                "the API key is not valid; make one with: vmcell key create",
                code="unauthenticated",
            )
        return key

    def _note_use(self, key: ApiKey) -> None:
        moment = now_ms()
        if moment - (key.last_used_at_unix_ms or 0) < LAST_USED_STEP_MS:
            return
        try:
            self._keys.touch(key.key_id)
        except HostError as error:  # a request that can be answered is
            log.warning("the last use of key %s was not noted: %s", key.key_id, error)


def presented_key(req: falcon.Request) -> str:
    """The key that the request came with, unchecked; "" for none."""
    return req.get_header("X-API-KEY") or _bearer(req.get_header("Authorization") or "")


def timeout_limit_s(team: Team, config: ApiConfig) -> int:
    """How long a sandbox of the team may be told to live: the lower of both limits."""
    return min(config.max_timeout_s, team.max_timeout_s or config.max_timeout_s)


def _is_open(req: falcon.Request) -> bool:
    return req.method == "OPTIONS" or req.path in OPEN_PATHS or req.path.startswith(OPEN_PREFIX)


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
