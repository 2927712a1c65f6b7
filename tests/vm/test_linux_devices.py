"""A real Linux guest uses every virtio device, with frames moved by the kernel and by ourselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deep import one_in
from dev_vm import DevVm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parents[1] / "support" / "linux_devices" / "host.py"
TRANSFER_BYTES = 2 << 20
DRIVERS = {
    "virtio0": "virtio_pmem 15",
    "virtio1": "virtio_blk 15",
    "virtio2": "virtio_blk 15",
    "virtio3": "virtio_net 15",
    "virtio4": "vmw_vsock_virtio_transport 15",
    "virtio5": "virtio_rng 15",
}


def _run(dev_vm: DevVm, path: str, place: str) -> dict[str, Any]:
    return dev_vm.report_of(PROGRAM, path, place, str(TRANSFER_BYTES), timeout_s=540)


@pytest.mark.parametrize(
    ("path", "place"),
    one_in(4, [("kernel", "tap"), ("user", "tap"), ("kernel", "pod"), ("user", "pod")]),
)
def test_every_device(dev_vm: DevVm, path: str, place: str) -> None:
    """In a pod the frames go by tc redirects and a veth, in large segments either way."""
    found = _run(dev_vm, path, place)
    guest = found["guest"]
    assert guest, found["console"]
    assert guest["drivers"] == DRIVERS
    for name in ("vsock", "network"):
        ours, theirs = found[name], guest[name]
        assert ours["received"] == theirs["received"] == TRANSFER_BYTES
        assert ours["sent_digest"] == theirs["received_digest"]
        assert theirs["sent_digest"] == ours["received_digest"]
    assert guest["disk"] == {
        "read_back": True,
        "discarded": True,
        "kept": True,
        "vda_read_only": "1",
        "serial": "vmcell1",
    }
    assert guest["entropy_bytes"] == 64
    assert guest["echoes"] == found["echoes"] == 20
    assert guest["network"]["mac"] == "02:c0:ff:ee:00:01"
    assert found["vhost_opened"] or path == "user"
    assert found["exit"]["reason"] == "guest_panic"
