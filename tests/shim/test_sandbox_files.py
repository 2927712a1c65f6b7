"""The files of sandboxes beside each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COME_AND_GO = """
import os, sys
sys.path[:0] = sys.argv[3:]
from vmcell_shim.sandbox_files import SandboxFiles
for _ in range(1000):
    files = SandboxFiles(sys.argv[1])
    files.create(sys.argv[2])
    files.remove()
"""


def test_sandboxes_of_a_namespace_come_and_go_at_once(tmp_path: Path) -> None:
    """The end of the last one removes the namespace's directory while the next one enters it."""
    roots = [str(ROOT / "protos"), str(ROOT / "shim")]
    running = []
    for name in ("a", "b"):
        bundle = tmp_path / f"bundle-{name}"
        bundle.mkdir()
        command = [sys.executable, "-c", COME_AND_GO, str(tmp_path / "run/ns" / name), str(bundle)]
        running.append(subprocess.Popen([*command, *roots], stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert not (tmp_path / "run/ns").exists()
