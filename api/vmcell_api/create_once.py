"""Creates with an Idempotency-Key: the same key and body get the same sandbox, made once.

Sources: E2B's API reference for the header's form and the `error_code` words; the statuses are
those of the IETF's draft on the header (422 another body, 409 still in progress). What a repeat
gets: the running sandbox; 409 while it is being made; 409 for good when it has ended. A create that
is known to have failed frees its key. One whose outcome nobody knows (the API died, noded does not
answer) holds it until no create may be on its way any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass

from vmcell_api.coded_errors import CodedCallerError
from vmcell_api.control_plane import ControlPlane, Pair
from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.sandbox_bodies import CreateBody
from vmcell_api.store.create_keys import CreateKey, CreateKeys
from vmcell_api.store.records import Team, now_ms
from vmcell_protos.errors import CallerError, HostError, VmcellError

log = logging.getLogger("vmcell.api")

KEY_FORM = re.compile(r"[a-z0-9-]{1,255}")
MOST_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """The key of a request, and the fingerprint of what it was sent with."""

    key: str
    fingerprint: str


def parse_idempotency(
    header: str | None, body: dict[str, object], version: int
) -> Idempotency | None:
    """The header `Idempotency-Key` with its body; None without one. Raises CallerError."""
    if header is None:
        return None
    if not KEY_FORM.fullmatch(header):
        raise CallerError(
            f"Idempotency-Key is {header[:40]!r}; it takes 1 to 255 of a-z, 0-9 and '-'"
        )
    text = json.dumps([version, body], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Idempotency(key=header, fingerprint=digest)


class CreateOnce:
    """Creates through `control`; `window_ms` is longer than any create may take. Thread-safe."""

    def __init__(self, control: ControlPlane, keys: CreateKeys, *, window_ms: int) -> None:
        self._control = control
        self._keys = keys
        self._window_ms = window_ms

    def create(self, team: Team, body: CreateBody, wish: Idempotency) -> Pair:
        """The sandbox of that key; raises CodedCallerError as the module says."""
        for _ in range(MOST_TRIES):
            wanted = CreateKey(
                team_id=team.team_id,
                key=wish.key,
                fingerprint=wish.fingerprint,
                sandbox_id=new_sandbox_id(),
                created_at_unix_ms=now_ms(),
            )
            standing = self._keys.take(wanted)
            if standing is None:
                return self._make(team, body, wanted)
            found = self._repeat(team, standing, wish)
            if found is not None:
                return found
            self._keys.free(standing)
        raise _in_progress(wish.key)

    def _make(self, team: Team, body: CreateBody, taken: CreateKey) -> Pair:
        try:
            made = self._control.create(team, body, sandbox_id=taken.sandbox_id)
        except VmcellError:
            if not self._control.may_exist(team, taken.sandbox_id):
                self._keys.free(taken)
            raise
        try:
            self._keys.mark_done(taken)
        except HostError as error:  # a repeat finds it running all the same
            log.error("sandbox %s runs, but %s", taken.sandbox_id, error)
        return made

    def _repeat(self, team: Team, standing: CreateKey, wish: Idempotency) -> Pair | None:
        """The sandbox the key stands for; None when it stands for nothing any more."""
        if standing.fingerprint != wish.fingerprint:
            raise CodedCallerError(
                f"Idempotency-Key {wish.key[:40]!r} was sent with another body; use a new key",
                error_code="idempotency_request_mismatch",
                status=422,
            )
        try:
            return self._control.get(team, standing.sandbox_id)
        except CallerError as error:
            if error.code != "not_found":
                raise
        if standing.done:
            raise CodedCallerError(
                f"the sandbox of Idempotency-Key {wish.key[:40]!r} has ended; use a new key",
                error_code="sandbox_create_refused",
                code="aborted",
            )
        if now_ms() - standing.created_at_unix_ms < self._window_ms:
            raise _in_progress(wish.key)
        return None


def _in_progress(key: str) -> CodedCallerError:
    return CodedCallerError(
        f"the create of Idempotency-Key {key[:40]!r} is still in progress; ask again soon",
        error_code="idempotency_in_progress",
        code="aborted",
        retry=True,
    )
