"""The inventory of a host: what containerd has by its own `ctr`, and what differs between two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from real_containerd import real_containerd

from vmcell_protos.errors import HostError
from vmcell_tools.leak_check import IN_CONTAINERD, leaks, take_inventory


def test_only_what_is_new_is_a_leak() -> None:
    before = {"mounts": ["/a"], "tasks": []}
    after = {"mounts": ["/a", "/b"], "tasks": ["default c1"], "leases": ["default l"]}
    assert leaks(before, after) == ["mounts: /b", "tasks: default c1", "leases: default l"]
    assert not leaks(after, before)


def test_a_containerd_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="listing the namespaces"):
        take_inventory(f"{tmp_path}/none.sock")


@pytest.mark.root
def test_containerds_things_by_namespace(tmp_path: Path) -> None:
    with real_containerd(tmp_path / "containerd") as containerd:
        before = take_inventory(containerd.socket)
        for namespace in ("one", "two"):
            containerd.ctr("leases", "create", "--id", "kept", namespace=namespace)
        containerd.ctr("snapshots", "prepare", "upper", namespace="one")
        containerd.ctr("snapshots", "prepare", "done", namespace="two")
        containerd.ctr("snapshots", "commit", "committed", "done", namespace="two")
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"ociVersion": "1.0.2", "root": {"path": "rootfs"}}))
        containerd.ctr("containers", "create", "--config", str(config), "c1", namespace="two")
        found = leaks(before, take_inventory(containerd.socket))
        ours = [line for line in found if line.partition(":")[0] in IN_CONTAINERD]
        assert ours == [
            "containers: two c1",
            "snapshots: one upper Active",
            "leases: one kept",
            "leases: two kept",
        ]


@pytest.mark.root
def test_one_process_answers_again_and_again(tmp_path: Path) -> None:
    with real_containerd(tmp_path / "containerd") as containerd:
        program = (
            "import sys; from vmcell_tools import leak_check; "
            f"leak_check.take_inventory.__defaults__ = ({containerd.socket!r},); "
            "leak_check.main(sys.argv)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, "--each-line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for count in range(3):
                process.stdin.write("\n")
                process.stdin.flush()
                assert len(json.loads(process.stdout.readline())["leases"]) == count
                containerd.ctr("leases", "create", "--id", f"l{count}")
            process.stdin.close()
            assert process.wait(30) == 0
