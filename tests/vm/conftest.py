"""The vm lane: one dev VM for the whole run, and nothing may be left after any test."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_release import NEWER, find_nerdctl, find_release
from cri.client import CriClient
from cri.pause_image import write_pause_image
from dev_vm import DevVm
from emulator_faults import run_once_or_twice
from second_containerd import NAMESPACE, SecondContainerd

from vmcell_tools.build_cache import BuildCache
from vmcell_tools.dev_containerd import CRI_PORT, CRI_STREAM_PORT
from vmcell_tools.dev_service import UP, VMCELL, import_image
from vmcell_tools.dev_ssh import forward_port
from vmcell_tools.dev_vm import running_vm
from vmcell_tools.leak_check import leaks
from vmcell_tools.oci_image import find_oci_image
from vmcell_tools.progress import Progress


@pytest.fixture(scope="session")
def dev_vm() -> Iterator[DevVm]:
    """The dev VM, up, with both images imported; `make test-vm` takes it down again."""
    subprocess.run(UP, check=True, timeout=600)
    status = json.loads(subprocess.check_output([*VMCELL, "dev", "status", "--json"]))
    vm = DevVm(
        name=status["name"],
        out=Path(status["out"]),
        api_url=f"http://127.0.0.1:{status['api_port']}",
        sandbox_url=f"http://127.0.0.1:{status['data_port']}",
    )
    with Progress("vm lane") as progress:
        import_image("small", ("default", "vmcell"), progress)
        import_image("base", ("vmcell",), progress)
    yield vm
    vm.watch.close()


@pytest.fixture
def nothing_left(dev_vm: DevVm) -> Iterator[None]:
    """Fails the test when a process, mount, TAP, snapshot or file of a sandbox outlives it."""
    before = dev_vm.inventory()
    yield
    assert not leaks(before, dev_vm.inventory())


@pytest.fixture(scope="session")
def second(dev_vm: DevVm) -> Iterator[SecondContainerd]:
    """A containerd 2.x beside Debian's; skipped where it has not been built."""
    daemon = SecondContainerd(dev_vm, find_release(NEWER), find_nerdctl())
    daemon.start(NAMESPACE, "k8s.io")
    yield daemon
    daemon.stop()


@pytest.fixture
def restart_containerd() -> str:
    """A script for the VM's shell: kill -9, a moment without, a new daemon that answers."""
    return (
        "pid=$(pgrep -fx 'containerd --config /etc/containerd/config.toml'); kill -9 $pid; "
        "while kill -0 $pid 2>/dev/null; do sleep 0.1; done; sleep 5; "
        "setsid containerd --config /etc/containerd/config.toml "
        ">>/mnt/out/containerd.log 2>&1 </dev/null & "
        "until ctr version >/dev/null 2>&1; do sleep 0.2; done"
    )


@pytest.fixture(scope="session")
def cri(dev_vm: DevVm) -> Iterator[CriClient]:
    """The VM's CRI from here, through ssh, with the small image for pods."""
    handler = os.environ.get("VMCELL_CRI_HANDLER", "vmcell")
    with Progress("vm lane") as progress:
        import_image("small", ("k8s.io",), progress)
        if handler == "runc":
            image = find_oci_image("small", BuildCache.default(), progress)
            assert image is not None
            write_pause_image(image.archive, dev_vm.out)
            dev_vm.check("ctr", "-n", "k8s.io", "images", "import", "/mnt/out/pause.tar")
    vm = running_vm(dev_vm.name)
    ports = [forward_port(vm.directory, port) for port in (CRI_PORT, CRI_STREAM_PORT)]
    with CriClient(
        f"127.0.0.1:{ports[0]}", handler=handler, stream_address=f"127.0.0.1:{ports[1]}"
    ) as client:
        yield client


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A test that met a guest which the software CPU lost is run once more, and says so."""
    return run_once_or_twice(item, nextitem) or None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows the guest's console and the shim's log."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    vm = getattr(item, "funcargs", {}).get("dev_vm")
    if report.failed and vm is not None:
        report.sections.append(("logs of the dev VM", vm.logs()))
