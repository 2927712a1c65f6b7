"""A template built for real, by the unmodified SDK, in a microVM of the dev VM's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from dev_vm import SMALL, DevVm
from e2b import Sandbox, Template
from e2b.exceptions import BuildException

from vmcell_tools.leak_check import leaks

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PATIENCE_S = 300


def _steps(context: Path, marker: str) -> object:
    return (
        Template(file_context_path=context)
        .from_image(SMALL)
        .copy("app", "/srv/app", mode=0o755)
        .set_envs({"MARKER": marker, "PATH": "/srv/bin:$PATH"})
        .set_workdir("/srv/app")
        .run_cmd("cat hello.txt; rmdir /mnt; echo from-$MARKER > made; id -un", user="root")
    )


def test_build_cache_failure_and_a_sandbox_of_it(service: DevVm, tmp_path: Path) -> None:
    before = service.inventory()
    (tmp_path / "app").mkdir()
    (tmp_path / "app/hello.txt").write_text("hello from the context\n")
    marker = f"m{time.monotonic_ns()}"
    lines: list[str] = []

    def note(entry: object) -> None:
        lines.append(entry.message)  # type: ignore[attr-defined]  # the SDK's LogEntry

    template = _steps(tmp_path, marker).set_start_cmd(  # type: ignore[attr-defined]  # a builder
        "echo started > /tmp/started; sleep 1000", "test -s /tmp/started"
    )
    first = Template.build(template, "vm-shop:v1", on_build_logs=note)
    assert "hello from the context" in lines, "the output of a step is in the log"
    assert "root" in lines

    lines.clear()
    began = time.monotonic()
    second = Template.build(template, "vm-shop:v2", on_build_logs=note)
    seconds = time.monotonic() - began
    assert len([line for line in lines if "CACHED" in line]) == 4
    assert not any("microVM" in line for line in lines), "nothing was left to do"
    assert second.build_id != first.build_id
    assert seconds < 60

    broken = _steps(tmp_path, marker).run_cmd("echo the reason >&2; exit 7")  # type: ignore[attr-defined]  # a builder
    with pytest.raises(BuildException, match="the reason") as caught:
        Template.build(broken, "vm-shop:v3", on_build_logs=note)
    assert "exit status 7" in str(caught.value)
    nobody = _steps(tmp_path, marker).run_cmd("whoami", user="root123")  # type: ignore[attr-defined]  # a builder
    with pytest.raises(BuildException, match="unauthenticated: invalid username: 'root123'"):
        Template.build(nobody, "vm-shop:v4", on_build_logs=note)
    assert {tag.tag for tag in Template.get_tags("vm-shop")} == {"v1", "v2"}

    with Sandbox.create(template="vm-shop:v2", timeout=900, request_timeout=PATIENCE_S) as sandbox:
        shown = sandbox.commands.run(
            "pwd; cat made; echo $MARKER; echo $PATH; cat /tmp/started; "
            "stat -c %a:%U hello.txt; [ -e /mnt ] || echo gone",
            timeout=PATIENCE_S,
        ).stdout.splitlines()
        assert shown[:3] == ["/srv/app", f"from-{marker}", marker]
        assert "started" in shown
        assert shown[-2:] == ["755:user", "gone"]
    assert not leaks(before, service.inventory())
