"""The dev VM's zygote: real guests from it, its death, and what comes after."""

from __future__ import annotations

import pytest
from dev_vm import RUNTIME, SMALL, DevVm

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_left")]

# services.sh starts the zygote when containerd answers, and again after its end.
WAIT = (
    "n=0; until ss -xlH | grep -q /run/vmcell/; do"
    " [ $n -gt 600 ] && exit 9; n=$((n + 1)); sleep 0.1; done; "
)
# The brackets keep the shells that say this from matching.
ZYGOTE = "pgrep -o -f '[c]ontainerd-shim-vmcell-v2 zygote'"


def parents(dev_vm: DevVm, name: str) -> tuple[int, int, int]:
    """The zygote's pid, the parent of the task's VMM, and of the shim that is named in it."""
    script = (
        f"{ZYGOTE}; vmm=$(ctr task list | awk '$1 == \"{name}\" {{ print $2 }}');"
        " awk '{ print $4 }' /proc/$vmm/stat;"
        f" shim=$(pgrep -f '[c]ontainerd-shim-vmcell-v2 .*-id {name} ');"
        " awk '{ print $4 }' /proc/$shim/stat"
    )
    zygote, vmm, shim = dev_vm.check("sh", "-c", script).split()
    return int(zygote), int(vmm), int(shim)


@pytest.mark.deep
def test_a_sandbox_outlives_the_zygote_and_the_next_start_works(dev_vm: DevVm) -> None:
    dev_vm.check("sh", "-c", WAIT)
    try:
        for name in ("zyg-a", "zyg-b"):
            dev_vm.check("ctr", "run", "-d", "--runtime", RUNTIME, SMALL, name, "sleep", "600")
            zygote, vmm, shim = parents(dev_vm, name)
            assert (vmm, shim) == (zygote, zygote)
            dev_vm.check("sh", "-c", f"kill -9 $({ZYGOTE})")
            result = dev_vm.run("ctr", "task", "exec", "--exec-id", "e", name, "echo", "here")
            assert result.text == "here\n", result.error_text
            # Whether the next zygote is there by now or not.
            assert dev_vm.ctr_run("zyg-next", "sh", "-c", "exit 7").code == 7
            dev_vm.check("sh", "-c", WAIT)
        result = dev_vm.run("sh", "-c", "kill -9 $(ctr task list | awk '/zyg-a/ { print $2 }')")
        assert result.code == 0
        deleted = dev_vm.run(
            "sh", "-c", "until ctr task list | grep -q 'zyg-a.*STOPPED'; do sleep 0.2; done;"
            " ctr task delete zyg-a",
        )  # fmt: skip
        assert "137" in deleted.error_text
    finally:
        for name in ("zyg-a", "zyg-b"):
            dev_vm.run("ctr", "task", "kill", "-s", "KILL", name)
            dev_vm.run("ctr", "task", "delete", "-f", name)
            dev_vm.run("ctr", "container", "delete", name)
