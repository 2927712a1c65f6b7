"""One code interpreter for many tests, and the SDK's own Sandbox object pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2b import ConnectionConfig
from e2b_code_interpreter import Sandbox
from interpreter_harness import Interpreter, running_interpreter
from packaging.version import Version


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    with running_interpreter(tmp_path_factory.mktemp("interpreter")) as server:
        yield server


@pytest.fixture
def sandbox(interpreter: Interpreter) -> Sandbox:
    """The SDK object as `Sandbox.create` builds it from the control plane's answer."""
    return Sandbox(
        sandbox_id="i" + "0" * 20,
        sandbox_domain=None,
        envd_version=Version("0.6.13"),
        envd_access_token="token",
        traffic_access_token=None,
        connection_config=ConnectionConfig(sandbox_url=interpreter.url),
    )


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Interpreter]:
    """A server of its own for a test that breaks it."""
    with running_interpreter(tmp_path) as server:
        yield server
