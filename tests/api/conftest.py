"""A service of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ApiService]:
    with api_service(tmp_path) as running:
        yield running
