"""A service of its own for each test, and both databases that the store knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service
from private_postgres import PrivatePostgres, private_postgres


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ApiService]:
    with api_service(tmp_path) as running:
        yield running


# Not for the session: other modules look at the children that this process has.
@pytest.fixture(scope="module")
def postgres() -> Iterator[PrivatePostgres]:
    with private_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store/api.sqlite"
    server: PrivatePostgres = request.getfixturevalue("postgres")
    return server.database()
