"""docs/sandboxes.md is a script that runs, in one shell, from its first line to its last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from api_service import api_service, listening
from click import Group
from fake_envd import fake_envd
from source_tree import ROOT

from vmcell_tools.cli import main

PATIENCE_S = 100


def _lines() -> list[str]:
    text = (ROOT / "docs" / "sandboxes.md").read_text()
    found = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return [line for line in found if not line.startswith("export ")]


def test_every_line_works_in_this_order(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "vmcell"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmcell_tools "$@"\n')
    program.chmod(0o755)
    with (
        api_service(tmp_path / "api") as service,
        listening(service.app) as address,
        fake_envd() as envd,
    ):
        service.node.on_create = lambda order: setattr(envd, "token", order.access_token)
        # The copies' tokens are their own; only the first sandbox runs commands.
        script = "\n".join(_lines())
        done = subprocess.run(
            ["sh", "-eux", "-c", script],
            env={
                **os.environ,
                "PATH": f"{program.parent}:{os.environ['PATH']}",
                "E2B_API_URL": f"http://{address}",
                "E2B_SANDBOX_URL": envd.url,
                "E2B_API_KEY": service.key,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "hello\n/\n" in done.stdout
        assert not [key for key in service.node.saved if key.startswith("snap-")]
        assert len(service.node.running) == 3, "two copies and one of the snapshot"


def test_the_page_names_every_command() -> None:
    text = "\n".join(_lines())
    for name in ("sandbox", "snapshot"):
        group = main.commands[name]
        assert isinstance(group, Group)
        missing = [word for word in group.commands if f"vmcell {name} {word}" not in text]
        assert not missing, missing
