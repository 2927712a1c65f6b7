"""Every command of the README is run: here, by `make test` itself, or by the test named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from dev_vm import DevVm
from source_tree import ROOT

pytestmark = [pytest.mark.vm]

RUN_ELSEWHERE = {
    "make test": "what runs this",
    "make artifacts": "a step of make test",
    ".venv/bin/vmcell serve": "tests/vm/e2b_clients, by its fixture",
    ".venv/bin/vmcell key create --team me": "tests/vm/e2b_clients, by its fixture",
    "python examples/first_sandbox.py": "tests/vm/test_readme.py, by make demo",
    ".venv/bin/vmcell dev up": "tests/vm/test_dev_vm.py",
    ".venv/bin/vmcell dev down": "the last step of make test",
}
IN_THE_VM = (".venv/bin/vmcell setup", ".venv/bin/vmcell doctor", ".venv/bin/vmcell image", "ctr ")


def readme_commands() -> list[str]:
    """The indented lines of the README, comments cut off, continued lines joined."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    commands = (re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in lines)
    return [command for command in commands if not command.startswith("export ")]


def test_every_command_has_its_test() -> None:
    unknown = [
        command
        for command in readme_commands()
        if command not in RUN_ELSEWHERE
        and command != "make demo"
        and not command.startswith((*IN_THE_VM, ".venv/bin/vmcell dev run"))
    ]
    assert not unknown


@pytest.mark.usefixtures("nothing_left")
def test_containerd_commands_as_they_stand(dev_vm: DevVm) -> None:
    """The commands for a host with KVM, run in the dev VM, which is one."""
    commands = [
        command
        for command in readme_commands()
        if command.startswith(IN_THE_VM) and command not in RUN_ELSEWHERE
    ]
    assert len(commands) == 4
    for command in commands:
        output = dev_vm.check(
            "sh", "-c", f"cd {shlex.quote(str(ROOT))} && {command}", timeout_s=300
        )
    assert output.startswith("6.12")


@pytest.mark.usefixtures("dev_vm")
def test_dev_vm_command_as_it_stands() -> None:
    (command,) = [c for c in readme_commands() if c.startswith(".venv/bin/vmcell dev run")]
    words = [sys.executable, "-m", "vmcell_tools", *shlex.split(command)[1:]]
    output = subprocess.check_output(words, cwd=ROOT, text=True, timeout=300)
    assert output.startswith("6.12")


@pytest.mark.usefixtures("dev_vm", "nothing_left")
@pytest.mark.deep
def test_make_demo() -> None:
    done = subprocess.run(
        ["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("equal", "exit code 3", "listed: True"):
        assert words in done.stdout
    assert "no process, mount, TAP, snapshot or file of the sandbox is left" in done.stdout
