"""A pandas DataFrame as E2B's `data`: column name → list of plain values, row by row."""

from __future__ import annotations

import math
from datetime import date, datetime, time, timedelta
from typing import Any

# More would be megabytes of JSON beside an HTML table that pandas itself cuts short.
MAX_CELLS = 100_000


def frame_data(frame: Any) -> dict[str, list[object]] | None:
    """The columns of a DataFrame; None when it has more than MAX_CELLS cells.

    Times are ISO 8601, what is missing is None, what JSON has no word for is its text.
    """
    if frame.size > MAX_CELLS:
        return None
    return {
        str(name): [plain(value) for value in frame.iloc[:, number].tolist()]
        for number, name in enumerate(frame.columns)
    }


def plain(value: Any) -> object:
    """A value as JSON has it."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    # NaT, pandas.NA and numpy's missing times are unequal to themselves, or to nothing at all
    if type(value).__name__ in ("NaTType", "NAType"):
        return None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        simple = item()
        if type(simple) is not type(value):
            return plain(simple)
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if isinstance(value, dict):
        return {str(key): plain(element) for key, element in value.items()}
    return str(value)
