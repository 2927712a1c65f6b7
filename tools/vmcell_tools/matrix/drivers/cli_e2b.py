"""Commands of the npm package `@e2b/cli`, as a user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from report import PATIENCE_S, OneSandbox, expect, run_calls

TEMPLATE = os.environ.get("VMCELL_MATRIX_TEMPLATE", "base")
PROGRAM = Path(os.environ["VMCELL_MATRIX_ENVIRONMENT"]) / "node_modules" / ".bin" / "e2b"


def e2b(*words):
    """What the command printed; an AssertionError with its last line when it failed."""
    done = subprocess.run(
        [str(PROGRAM), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        # Without the trace, which names places on this machine.
        said = (done.stderr or done.stdout).strip().partition("\n    at ")[0] or "no word"
        raise AssertionError(f"exit {done.returncode}: {' '.join(said.splitlines())}")
    return done.stdout


class Calls(OneSandbox):
    """The commands, on one sandbox."""

    def create(self):
        found = re.search(r"\b(i[a-z0-9]{19,20})\b", e2b("sandbox", "create", "--detach", TEMPLATE))
        assert found, "no sandbox id was printed"
        self._made = found[1]

    def list(self):
        listed = json.loads(e2b("sandbox", "list", "--format", "json"))
        assert self.sandbox in [item["sandboxId"] for item in listed], listed

    def info(self):
        assert self.sandbox in e2b("sandbox", "info", "--format", "json", self.sandbox)

    def exec(self):
        expect(e2b("sandbox", "exec", self.sandbox, "echo", "hi"), "hi\n")

    def logs(self):
        e2b("sandbox", "logs", "--format", "json", self.sandbox)

    def metrics(self):
        e2b("sandbox", "metrics", "--format", "json", self.sandbox)

    def pause(self):
        e2b("sandbox", "pause", self.sandbox)

    def resume(self):
        e2b("sandbox", "resume", self.sandbox)

    def kill(self):
        e2b("sandbox", "kill", self.sandbox)

    def templates(self):
        e2b("template", "list", "--format", "json")


def main():
    c = Calls()
    run_calls(
        [
            ("sandbox create --detach", c.create),
            ("sandbox list", c.list),
            ("sandbox info", c.info),
            ("sandbox exec", c.exec),
            ("sandbox logs", c.logs),
            ("sandbox metrics", c.metrics),
            ("sandbox pause", c.pause),
            ("sandbox resume", c.resume),
            ("sandbox kill", c.kill),
            ("template list", c.templates),
        ]
    )


if __name__ == "__main__":
    main()
