"""The JavaScript SDK from npm, installed once for each lock file, outside the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "js"
INSTALL_WITHIN_S = 300
RUN_WITHIN_S = 100


def installed() -> Path:
    """A folder with the scripts of tests/js and their packages; skips where there is no npm."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm for the JavaScript SDK; Debian has them as nodejs and npm")
    lock = (SOURCE / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "vmcell" / "npm" / hashlib.sha256(lock).hexdigest()[:16]
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, folder)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_WITHIN_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()
    for script in SOURCE.glob("*.?js"):
        shutil.copy(script, folder)
    return folder


def run(script: str, **environment: str) -> dict[str, Any]:
    """The JSON object that the script prints last."""
    folder = installed()
    done = subprocess.run(
        ["node", "--require", str(folder / "localhost_names.cjs"), str(folder / script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=RUN_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(told, dict)
    return told
