"""The unmodified `e2b_code_interpreter` on the host against a sandbox of `code-interpreter-v1`."""

from __future__ import annotations

import base64

import pytest
from dev_vm import DevVm
from e2b_code_interpreter import Execution, Sandbox

from vmcell_tools.dev_service import import_image
from vmcell_tools.progress import Progress

pytestmark = pytest.mark.vm

PATIENCE_S = 300


@pytest.fixture(scope="module", autouse=True)
def image(dev_vm: DevVm) -> None:
    with Progress("vm lane") as progress:
        import_image("code-interpreter-v1", ("vmcell",), progress)


def run(sandbox: Sandbox, code: str, **options: object) -> Execution:
    execution = sandbox.run_code(code, timeout=PATIENCE_S, **options)  # type: ignore[call-overload]  # options of a test
    assert isinstance(execution, Execution)
    assert execution.error is None, execution.error
    return execution


@pytest.mark.deep
def test_code_in_a_microvm(service: DevVm, nothing_left: None) -> None:
    with Sandbox.create(timeout=900, request_timeout=PATIENCE_S, envs={"COLOUR": "red"}) as sandbox:
        release = run(sandbox, "import os, platform; platform.release(), os.environ['COLOUR']")
        assert "6.12" in (release.text or "")
        assert "'red'" in (release.text or "")
        code = "import matplotlib.pyplot as plt; plt.plot([1, 2], [3, 4]); plt.show(); size = 7"
        (shown,) = run(sandbox, code).results
        assert base64.b64decode(shown.png or "").startswith(b"\x89PNG\r\n\x1a\n")
        assert shown.chart is not None
        assert run(sandbox, "size * 6", envs={"X": "1"}).text == "42"
        answer = run(sandbox, "import os from 'node:os'; os.cpus().length", language="js")
        assert answer.text == "2"

        # the server is killed with its kernels, and comes again
        before = sandbox.list_code_contexts()
        sandbox.commands.run(
            "kill -9 $(pgrep -o -f 'python3 -I -m vmcell_interpreter'); "
            "until bash -c '</dev/tcp/127.0.0.1/49999' 2>/dev/null; do sleep 0.2; done",
            user="root",
            timeout=PATIENCE_S,
        )
        after = sandbox.list_code_contexts()
        assert not {context.id for context in before} & {context.id for context in after}
        assert run(sandbox, "1 + 1").text == "2"
