"""What only a containerd 2.x asks of the shim and of `vmcell setup`; the guest is a fake."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from containerd_release import NEWER, Release, find_release
from cri.client import CriClient
from private_containerd import IMAGE, RUNTIME, PrivateContainerd
from shim_harness import wait_until

from vmcell_tools import containerd_setup
from vmcell_tools.containerd_config import CRI_V3, HANDLER, POD_ANNOTATIONS

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def release() -> Release:
    return find_release(NEWER)


@pytest.fixture(scope="module")
def daemon(
    release: Release, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateContainerd]:
    directory = tmp_path_factory.mktemp("two")
    containerd = PrivateContainerd(directory, fake_guest=True, cri=True, release=release)
    containerd.start()
    try:
        containerd.import_image()
        containerd.import_image(namespace="k8s.io")
        yield containerd
    finally:
        containerd.kill()


@pytest.fixture
def containerd(daemon: PrivateContainerd) -> Iterator[PrivateContainerd]:
    yield daemon
    daemon.ctr("task", "delete", "-f", "c1")
    daemon.ctr("container", "delete", "c1")
    wait_until(lambda: daemon.leftovers() == [], f"an end of {daemon.leftovers()}")


def test_the_task_service_is_v3(containerd: PrivateContainerd) -> None:
    """containerd 2.3 writes BootstrapParams to stdin, and keeps what `start` answered."""
    assert containerd.run("c1", "sleep", "600", flags=("-d",)).returncode == 0
    bundle = containerd.directory / "state/io.containerd.runtime.v2.task/default/c1"
    answer = json.loads((bundle / "bootstrap.json").read_text())
    assert (answer["version"], answer["protocol"]) == (3, "ttrpc")
    assert answer["address"] == (bundle / "address").read_text()


def test_erofs_layers_reach_the_guest_as_they_are(containerd: PrivateContainerd) -> None:
    """The snapshotter's own images, unmounted and unconverted (`-info` of 2.2 on).

    Debian's mkfs.erofs is too old for the differ that makes them of archives; they are made of
    directories then.
    """
    plugins = containerd.ctr("plugins", "list").stdout.decode().splitlines()
    (row,) = [line.split() for line in plugins if ".snapshotter.v1" in line and " erofs " in line]
    assert row[-1] == "ok", "needs mkfs.erofs and erofs of the kernel"
    done = containerd.run("c1", "sleep", "600", flags=("-d", "--snapshotter", "erofs"))
    assert done.returncode == 0, done.stderr
    log = (containerd.directory / "run/default/c1/shim.log").read_text()
    (line,) = [line for line in log.splitlines() if "root images" in line]
    root = containerd.directory / "root" / "io.containerd.snapshotter.v1.erofs/snapshots"
    images = re.findall(rf"{root}/\d+/layer\.erofs", line)
    assert len(set(images)) == 2


def test_streaming_io_is_refused_by_name(containerd: PrivateContainerd, tmp_path: Path) -> None:
    """CRI dials the shim for the streams, before there is a task."""
    with CriClient(f"unix://{containerd.socket}", handler="vmcell-streaming") as cri:
        cri.wait_ready()
        pod = cri.run_pod(cri.pod_config("streams", log_directory=str(tmp_path)))
        try:
            with pytest.raises(grpc.RpcError) as caught:
                cri.create(pod, "only", IMAGE, "true")
            assert "streaming.v1.Streaming is not offered" in caught.value.details()
        finally:
            cri.stop_pod(pod)
            cri.remove_pod(pod)


@pytest.mark.parametrize("before", [None, "version = 4\n", "version = 3\n", "version = 2\n"])
def test_setup_writes_what_containerd_reads(
    release: Release, tmp_path: Path, before: str | None
) -> None:
    assert release.directory is not None
    config = tmp_path / "etc/containerd/config.toml"
    if before is not None:
        config.parent.mkdir(parents=True)
        config.write_text(before)
    containerd_setup.merge(tmp_path, str(release.directory))
    dumped = subprocess.run(
        [release.program("containerd"), "--config", str(config), "config", "dump"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    runtimes = tomllib.loads(dumped.stdout)["plugins"][CRI_V3]["containerd"]["runtimes"]
    assert runtimes["runc"]["runtime_type"] == "io.containerd.runc.v2"
    ours = runtimes[HANDLER]
    assert ours["runtime_type"] == RUNTIME
    assert ours["pod_annotations"] == list(POD_ANNOTATIONS)
    assert ours["privileged_without_host_devices"] is True
