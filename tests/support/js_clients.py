"""The JavaScript SDK from npm, installed once for each lock file, outside the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "js"
INSTALL_WITHIN_S = 300
RUN_WITHIN_S = 100
NO_NPM = "needs node and npm for the JavaScript SDK; Debian has them as nodejs and npm"


def install() -> str:
    """Installs the packages where that is not done; why it could not be, "" when they are there.

    Before a test enters a network of its own: npm needs the registry.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return NO_NPM
    folder = _folder()
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, folder)
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_WITHIN_S,
            check=False,
        )
        if done.returncode:
            return f"npm ci failed: {done.stderr[-1500:]}"
        (folder / "complete").touch()
    return ""


def run(script: str, **environment: str) -> dict[str, Any]:
    """The JSON object that the script prints last."""
    folder = _folder()
    for source in SOURCE.glob("*.?js"):
        shutil.copy(source, folder)
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


def _folder() -> Path:
    """One for each lock file."""
    digest = hashlib.sha256((SOURCE / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "vmcell" / "npm" / digest
