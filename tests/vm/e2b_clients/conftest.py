"""One service for all clients: its start costs a quarter of a minute of the software CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dev_vm import DevVm

from vmcell_tools.dev_service import VOLUME_PORT, create_key, start_service, stop_service
from vmcell_tools.dev_ssh import forward_port
from vmcell_tools.dev_vm import running_vm


@pytest.fixture(scope="package")
def service(dev_vm: DevVm) -> Iterator[DevVm]:
    """noded, the API, nginx and volumes in the VM, a fresh key, and the SDKs' variables."""
    start_service(dev_vm.api_url)
    port = forward_port(running_vm(dev_vm.name).directory, VOLUME_PORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2B_API_URL", dev_vm.api_url)
        patch.setenv("E2B_SANDBOX_URL", dev_vm.sandbox_url)
        patch.setenv("E2B_VOLUME_API_URL", f"http://127.0.0.1:{port}")
        patch.setenv("E2B_API_KEY", create_key("vm-lane"))
        yield dev_vm
    stop_service()
