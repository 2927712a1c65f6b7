"""Environment variables for one run: set before it, put back after it. Called by the server."""

from __future__ import annotations

import os
from collections.abc import Mapping

_before: dict[str, str | None] = {}


def adopt(environment: Mapping[str, str]) -> None:
    """Sets variables for good."""
    os.environ.update(environment)


def enter(environment: Mapping[str, str]) -> None:
    """Sets variables and remembers what was there."""
    leave()
    for name in environment:
        _before[name] = os.environ.get(name)
    os.environ.update(environment)


def leave() -> None:
    """Puts back what `enter` has changed, whatever the run made of it."""
    while _before:
        name, value = _before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
