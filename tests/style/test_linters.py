"""Format, lint and types are tests like any other; a missing tool is a failure."""

from __future__ import annotations

import subprocess
import sys

import pytest
from source_tree import ROOT

COMMANDS = {
    "ruff-format": ["ruff", "format", "--check", "."],
    "ruff-check": ["ruff", "check", "--no-fix", "."],
    "mypy": ["mypy"],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_linter(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
