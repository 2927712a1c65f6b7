"""A kernel's answer that arrives while the server sends: the next run must not wait for ever."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from interpreter_harness import SOURCE_ROOT, interpreter_python

PROGRAM = Path(__file__).parents[1] / "support" / "late_kernel.py"


def test_an_answer_at_the_moment_of_a_question_holds_nothing_up() -> None:
    done = subprocess.run(
        [interpreter_python(), PROGRAM],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE_ROOT / "guest-agent")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "over", done.stderr
