"""Kubernetes' side of a real containerd, with the real shim binary and a fake guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cri.client import CriClient
from private_containerd import IMAGE, PrivateContainerd
from shim_harness import wait_until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    containerd = PrivateContainerd(tmp_path_factory.mktemp("cri"), fake_guest=True, cri=True)
    containerd.start()
    try:
        containerd.import_image(namespace="k8s.io")
        yield containerd
    finally:
        containerd.kill()


@pytest.fixture
def cri(daemon: PrivateContainerd) -> Iterator[CriClient]:
    with CriClient(f"unix://{daemon.socket}", handler="vmcell") as client:
        yield client
    wait_until(lambda: daemon.leftovers() == [], f"an end of {daemon.leftovers()}")


def test_version_and_image(cri: CriClient) -> None:
    assert cri.call("Version").runtime_name == "containerd"
    conditions = cri.call("Status").status.conditions
    assert {row.type: row.status for row in conditions} == {
        "RuntimeReady": True,
        "NetworkReady": True,
    }
    image = cri.messages.ImageSpec(image=IMAGE)
    assert IMAGE in cri.call("ImageStatus", image=image).image.repo_tags
    (listed,) = cri.call("ListImages").images
    assert listed.size > 0


def test_pod_on_the_hosts_network_is_refused(cri: CriClient, tmp_path: Path) -> None:
    config = cri.pod_config("refused", log_directory=str(tmp_path))
    options = config.linux.security_context.namespace_options
    options.network = cri.messages.NamespaceMode.Value("NODE")
    with pytest.raises(grpc.RpcError) as caught:
        cri.run_pod(config)
    assert "a microVM has a network of its own" in caught.value.details()
    assert not cri.call("ListPodSandbox").items


def test_unknown_handler_is_named(cri: CriClient, tmp_path: Path) -> None:
    config = cri.pod_config("unknown", log_directory=str(tmp_path))
    with pytest.raises(grpc.RpcError) as caught:
        cri.call("RunPodSandbox", config=config, runtime_handler="no-such-handler")
    assert "no-such-handler" in caught.value.details()
