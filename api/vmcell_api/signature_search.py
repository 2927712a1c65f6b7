"""Finding the sandbox of a signed file URL, with a bound on what strangers may make it cost.

A search tries every live sandbox's token, so it costs as much as there are sandboxes. What was
found once is remembered: neither the further requests of a download nor its client's next ones
search again. Searches that find nothing are counted, by client address and altogether.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from vmcell_api.data_route import ENVD_PORT, Refusal, Signed, Target, signing_token

MISSES_PER_CLIENT_S = 10
MISSES_PER_S = 50
FOUND_LIMIT = 4096


class MissLimit:
    """Searches without a find in the running second; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._second = 0
        self._misses: dict[str, int] = {}
        self._total = 0

    def take(self, client: str) -> bool:
        """Counts a search as one that finds nothing; False when the client may not search now."""
        with self._lock:
            second = int(self._clock())
            if second != self._second:
                self._second, self._misses, self._total = second, {}, 0
            if self._total >= MISSES_PER_S or self._misses.get(client, 0) >= MISSES_PER_CLIENT_S:
                return False
            self._misses[client] = self._misses.get(client, 0) + 1
            self._total += 1
            return True

    def give_back(self, client: str) -> None:
        """Takes the count of a search back that did find; one of an earlier second is gone."""
        with self._lock:
            if self._misses.get(client, 0) > 0:
                self._misses[client] -= 1
                self._total -= 1


class SignatureSearch:
    """`live_tokens()` answers the tokens of the sandboxes that run, by id. Thread-safe."""

    def __init__(self, live_tokens: Callable[[], Mapping[str, str]]) -> None:
        self._live_tokens = live_tokens
        self._limit = MissLimit()
        self._lock = threading.Lock()
        self._found: OrderedDict[Signed, str] = OrderedDict()

    def find(self, signed: Signed, client: str) -> Target | Refusal:
        """The sandbox whose token made the signature, perhaps one that has ended since."""
        with self._lock:
            sandbox_id = self._found.get(signed)
            if sandbox_id is not None:
                self._found.move_to_end(signed)
        return self._target(sandbox_id) if sandbox_id else self._search(signed, client)

    def forget(self, signed: Signed) -> None:
        """Lets the next `find` search anew: the sandbox has ended."""
        with self._lock:
            self._found.pop(signed, None)

    def _search(self, signed: Signed, client: str) -> Target | Refusal:
        if not self._limit.take(client):
            return Refusal(status=429, message="too many signatures tried; wait a second")
        sandbox_id = signing_token(signed, self._live_tokens())
        if sandbox_id is None:
            return Refusal(status=401, message="invalid signature")
        self._limit.give_back(client)
        with self._lock:
            self._found[signed] = sandbox_id
            if len(self._found) > FOUND_LIMIT:
                self._found.popitem(last=False)
        return self._target(sandbox_id)

    @staticmethod
    def _target(sandbox_id: str) -> Target:
        return Target(sandbox_id=sandbox_id, port=ENVD_PORT)
