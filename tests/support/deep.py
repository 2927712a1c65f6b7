"""Of many tests of a kind a few are run by `make test`, all by `make test DEEP=1`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(every: int, values: Iterable[object]) -> list[Any]:
    """The first of each `every` as it is, the others marked as deep."""
    return [
        pytest.param(*_arguments(value), marks=pytest.mark.deep) if number % every else value
        for number, value in enumerate(values)
    ]


def _arguments(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)
