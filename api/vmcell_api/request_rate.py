"""How many requests a second a team may make, counted for all workers of the service together.

The counters stand in an anonymous file that the workers inherit, so a limit is what it says however
the connections fall on them. The rule is the generic cell rate algorithm (ATM Forum, TM 4.0): one
moment per team, up to which its requests have used its rate up. Record locks guard it: they go with
a worker that is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmcell_protos.errors import CallerError

BURST_S = 2.0
# Sums of fractions are a little off; a microsecond lets nothing through that counts.
ROUNDING_S = 1e-6
_ROW = struct.Struct("=16sd")
_ROWS, _PROBES = 4096, 8


class RateExceeded(CallerError):
    """Too many requests; answered with 429 and `Retry-After`."""

    default_code = "resource_exhausted"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestRates:
    """Made before the workers fork, shared by them; thread-safe. `close()` is idempotent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._file = os.memfd_create("vmcell-request-rates", os.MFD_CLOEXEC)
        os.truncate(self._file, _ROW.size * _ROWS)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Frees the counters, in this process."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def take(self, team_id: str, per_s: int) -> None:
        """Counts one request; raises RateExceeded when the team has none left.

        At once a team may make those of two seconds.
        """
        name = hashlib.blake2b(team_id.encode(), digest_size=16).digest()
        with self._locked():
            now = self._clock()
            row, used_up_to = self._find(name, now)
            used_up_to = max(used_up_to, now)
            wait_s = used_up_to + 1 / per_s - now - BURST_S
            if wait_s <= ROUNDING_S:
                os.pwrite(self._file, _ROW.pack(name, used_up_to + 1 / per_s), row * _ROW.size)
                return
        raise RateExceeded(
            f"the team made more than {per_s} requests a second; send fewer, or have the operator "
            "raise the limit",
            retry_after_s=max(1, math.ceil(wait_s)),
        )

    def _find(self, name: bytes, now: float) -> tuple[int, float]:
        """The team's row, or the one it takes over: unused, idle, else the least used."""
        start = int.from_bytes(name[:4], "big")
        places = [(start + step) % _ROWS for step in range(_PROBES)]
        rows = [_ROW.unpack(os.pread(self._file, _ROW.size, at * _ROW.size)) for at in places]
        for place, (owner, used_up_to) in zip(places, rows, strict=True):
            if owner == name:
                return place, used_up_to
        least = min(range(_PROBES), key=lambda index: rows[index][1])
        return places[least], now

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread of one process at a time."""
        with self._lock:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
