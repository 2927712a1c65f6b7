"""One envd for many tests, and the SDK's own Sandbox object pointed at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2b import ConnectionConfig, Sandbox
from envd_harness import Envd, running_envd
from packaging.version import Version

# What the control plane would advertise; the SDK chooses its calls by it.
ENVD_VERSION = "0.6.13"

SandboxMaker = Callable[..., Sandbox]


@pytest.fixture(scope="module")
def envd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envd]:
    with running_envd(tmp_path_factory.mktemp("envd")) as server:
        yield server


@pytest.fixture
def fresh_envd(tmp_path: Path) -> Iterator[Envd]:
    with running_envd(tmp_path) as server:
        yield server


def make_sandbox(envd: Envd, token: str | None = None) -> Sandbox:
    """The SDK object as `Sandbox.create` builds it from the control plane's answer."""
    return Sandbox(
        sandbox_id="i" + "0" * 20,
        sandbox_domain=None,
        envd_version=Version(ENVD_VERSION),
        envd_access_token=token,
        traffic_access_token=None,
        connection_config=ConnectionConfig(
            sandbox_url=envd.url,
            extra_sandbox_headers={} if token is None else {"X-Access-Token": token},
        ),
    )


@pytest.fixture
def sandbox_for() -> SandboxMaker:
    return make_sandbox


@pytest.fixture
def sandbox(envd: Envd) -> Sandbox:
    return make_sandbox(envd)
