"""Samples of one thing, their quantiles, and the samples that failed.

A quantile is the nearest rank: a value that was measured, never one between two. With few samples
p99 is the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(kw_only=True)
class Series:
    """What `who` took for `what`, by the definition in `meaning`; each failure is a sentence."""

    what: str
    who: str
    meaning: str
    unit: str = "ms"
    values: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def quantile(self, share: float) -> float | None:
        """The smallest value that `share` (0 to 1) of all are not above; None without any."""
        if not self.values:
            return None
        rank = max(1, math.ceil(share * len(self.values)))
        return sorted(self.values)[rank - 1]

    @property
    def p50(self) -> float | None:
        return self.quantile(QUANTILES["p50"])

    @property
    def largest(self) -> float | None:
        return max(self.values, default=None)


def sample(series: Sequence[Series], measure: Callable[[], Sequence[float]]) -> bool:
    """One value for each series; whatever `measure` raises is one failure of each, and False.

    The samples before and after one that failed are worth as much as without it, so nothing but
    an interrupt ends a run.
    """
    try:
        found = measure()
        if len(found) != len(series):
            raise ValueError(f"{len(found)} values were measured for {len(series)} series")
    except Exception as error:  # noqa: BLE001  a failure is a result here, and is reported
        for row in series:
            row.failures.append(f"{type(error).__name__}: {error}")
        return False
    for row, value in zip(series, found, strict=True):
        row.values.append(value)
    return True
