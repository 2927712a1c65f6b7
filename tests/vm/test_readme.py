"""Every command of the README and of the installation on one host is run: here, by `make test`
itself, or by the test named."""

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
    ".venv/bin/python examples/first_sandbox.py": "tests/vm/test_readme.py, by make demo",
    "nerdctl run --rm --runtime io.containerd.vmcell.v2 alpine uname -r": "test_nerdctl.py",
    ".venv/bin/vmcell dev up --store mine --image small": "a step of make test, as make dev-up",
    ".venv/bin/vmcell dev down": "the last step of make test",
    "apt-get install git make": "a checkout is there",
    "git clone URL /opt/vmcell && cd /opt/vmcell": "a checkout is there",
    "ln -s /opt/vmcell/.venv/bin/vmcell /usr/local/bin/vmcell": "for comfort",
    "systemctl enable --now containerd": "the dev VM has no systemd; its containerd runs",
    "systemctl enable --now vmcell-zygote": "tests/tools/test_setup_host.py, by systemd-analyze",
}
IN_THE_VM = (".venv/bin/vmcell setup", ".venv/bin/vmcell doctor", ".venv/bin/vmcell image", "ctr ")


def readme_commands() -> list[str]:
    """The indented lines of both, the installation first, each once; comments cut off, continued
    lines joined."""
    guide = (ROOT / "docs/install.md").read_text()
    one_host = guide[guide.index("\n## On one host") : guide.index("\n## On many hosts")]
    text = (one_host + (ROOT / "README.md").read_text()).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    commands = (re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in lines)
    return list(dict.fromkeys(row for row in commands if not row.startswith("export ")))


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
