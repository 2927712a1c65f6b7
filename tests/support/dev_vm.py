"""The dev VM as the vm lane drives it: commands through `vmcell dev run`, logs from its share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vmcell_tools.dev_service import VMCELL

RUNTIME = "io.containerd.vmcell.v2"
SMALL = "docker.io/vmcell/small:latest"
BASE = "docker.io/vmcell/base:latest"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one command in the VM ended."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def error_text(self) -> str:
        return self.stderr.decode(errors="replace")


class LeakWatch:
    """A leak check that stays in the dev VM: its start is most of what one costs there.

    Started when it is first asked, and again when the VM that it was in is gone.
    """

    WITHIN_S = 120.0

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self) -> str:
        """An inventory, as JSON."""
        return self._answer() or self._answer() or pytest.fail("the leak check ends, see above")

    def close(self) -> None:
        """Ends it; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError):
                process.communicate(timeout=60)

    def _answer(self) -> str:
        """Empty when there is none: it has died, or was ended after WITHIN_S."""
        if self._process is None:
            words = [sys.executable, "-m", "vmcell_tools.leak_check", "--each-line"]
            self._process = subprocess.Popen(
                [*VMCELL, "dev", "run", "--", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = threading.Timer(self.WITHIN_S, process.terminate)
        deadline.start()
        try:
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            deadline.cancel()
        if not line:
            self.close()
        return line


@dataclass(frozen=True, kw_only=True)
class DevVm:
    """A dev VM that is up; `out` is the folder the VM writes its logs to (/mnt/out inside)."""

    name: str
    out: Path
    api_url: str
    sandbox_url: str
    watch: LeakWatch = field(default_factory=LeakWatch)

    def run(self, *command: str, stdin: bytes = b"", timeout_s: int = 120) -> Result:
        """Runs `command` as root in the VM; a command over its deadline fails the test."""
        done = subprocess.run(
            [*VMCELL, "dev", "run", "--timeout", str(timeout_s), "--", *command],
            input=stdin,
            capture_output=True,
            timeout=timeout_s + 30,
            check=False,
        )
        return Result(code=done.returncode, stdout=done.stdout, stderr=done.stderr)

    def check(self, *command: str, stdin: bytes = b"", timeout_s: int = 120) -> str:
        """Like `run`, for a command that has to succeed; its standard output as text."""
        result = self.run(*command, stdin=stdin, timeout_s=timeout_s)
        # What it printed before it failed is often all there is to go by.
        said = f"{result.error_text}\n{result.text[-5000:]}"
        assert result.code == 0, f"{command} ended with {result.code}: {said}"
        return result.text

    def config(self) -> dict[str, Any]:
        """The shim's settings in the VM, with the paths of the guest's kernel and base image."""
        return tomllib.loads(self.check("cat", "/etc/vmcell/config.toml"))

    def report_of(self, program: Path, *words: str, timeout_s: int) -> dict[str, Any]:
        """The JSON object that `program` prints in the VM, given the guest's kernel, base image and
        `words`."""
        config = self.config()
        artifacts = (config["kernel"], config["base_image"])
        output = self.check(
            sys.executable, os.fspath(program), *artifacts, *words, timeout_s=timeout_s
        )
        report: dict[str, Any] = json.loads(output)
        return report

    def ctr_run(
        self,
        *words: str,
        image: str = SMALL,
        namespace: str = "default",
        flags: tuple[str, ...] = (),
        stdin: bytes = b"",
    ) -> Result:
        """`ctr run --rm` of a vmcell container; words: container id, then the command."""
        command = ("ctr", "-n", namespace, "run", "--rm", "--runtime", RUNTIME)
        return self.run(*command, *flags, image, *words, stdin=stdin)

    def inventory(self) -> dict[str, list[str]]:
        """What sandboxes have on the VM right now (vmcell_tools.leak_check)."""
        found = json.loads(self.watch.ask())
        assert isinstance(found, dict)
        return found

    def logs(self, tail_bytes: int = 3000) -> str:
        """The ends of the newest logs in the share, those of sandboxes first: guest consoles,
        shims, VMMs; then the VM's own console, containerd, noded."""
        files = [path for path in self.out.rglob("*.log") if path.stat().st_size]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        of_sandboxes = [path for path in files if "sandboxes" in path.parts]
        others = [path for path in files if path not in of_sandboxes]
        return "\n".join(
            f"--- {path.relative_to(self.out)}\n"
            + path.read_bytes()[-tail_bytes:].decode(errors="replace")
            for path in (*of_sandboxes[:9], *others[:3])
        )
