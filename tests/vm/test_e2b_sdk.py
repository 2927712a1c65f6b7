"""The unmodified E2B SDK on the host against the service in the dev VM."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator

import pytest
from dev_vm import DevVm
from e2b import CommandExitException, NotFoundException, Sandbox
from e2b.exceptions import AuthenticationException, SandboxException

from vmcell_tools.dev_service import create_key, start_service, stop_service

pytestmark = pytest.mark.vm

PATIENCE_S = 300


@pytest.fixture(scope="module")
def service(dev_vm: DevVm) -> Iterator[DevVm]:
    """noded, API and nginx in the VM, a fresh key, and the SDK's variables set to them."""
    start_service(dev_vm.api_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2B_API_URL", dev_vm.api_url)
        patch.setenv("E2B_SANDBOX_URL", dev_vm.sandbox_url)
        patch.setenv("E2B_API_KEY", create_key("vm-lane"))
        yield dev_vm
    stop_service()


def _create(**options: object) -> Sandbox:
    return Sandbox.create(template="base", timeout=900, request_timeout=PATIENCE_S, **options)


def test_commands_files_and_isolation(service: DevVm) -> None:
    before = service.inventory()
    with _create(envs={"COLOUR": "red"}) as one, _create() as two:
        release = one.commands.run("uname -r", timeout=PATIENCE_S).stdout.strip()
        assert release.startswith("6.12")
        assert release != service.check("uname", "-r").strip()
        assert one.commands.run("echo $COLOUR", timeout=PATIENCE_S).stdout == "red\n"
        # envd is the last to go when memory runs out, what it starts is not
        scores = one.commands.run("cat /proc/self/oom_score_adj /proc/1/oom_score_adj")
        assert scores.stdout.split() == ["0", "-1000"]

        content = os.urandom(1 << 20)
        one.files.write("/home/user/blob", content, request_timeout=PATIENCE_S)
        digest = one.commands.run("sha256sum /home/user/blob", timeout=PATIENCE_S).stdout.split()[0]
        assert digest == hashlib.sha256(content).hexdigest()
        assert not two.files.exists("/home/user/blob", request_timeout=PATIENCE_S)

        with pytest.raises(CommandExitException) as raised:
            one.commands.run("echo oops >&2; exit 9", timeout=PATIENCE_S)
        assert (raised.value.exit_code, raised.value.stderr) == (9, "oops\n")

        address = two.commands.run("hostname -I", timeout=PATIENCE_S).stdout.split()[0]
        probe = f"timeout 5 bash -c '</dev/tcp/{address}/49983' && echo reached || echo closed"
        assert one.commands.run(probe, timeout=PATIENCE_S).stdout.strip() == "closed"

        listed = {info.sandbox_id for info in Sandbox.list().next_items()}
        assert {one.sandbox_id, two.sandbox_id} <= listed
    assert not one.is_running(request_timeout=PATIENCE_S)
    with pytest.raises((NotFoundException, SandboxException)):
        Sandbox.connect(one.sandbox_id)
    after = service.inventory()
    assert {kind: set(lines) - set(before[kind]) for kind, lines in after.items() if lines} == {
        kind: set() for kind, lines in after.items() if lines
    }


def test_timeout_kills(service: DevVm) -> None:
    sandbox = _create()
    sandbox.set_timeout(1)
    deadline = time.monotonic() + 60
    while sandbox.sandbox_id in {info.sandbox_id for info in Sandbox.list().next_items()}:
        assert time.monotonic() < deadline, "the timeout did not kill the sandbox"
    assert sandbox.kill() is False


def test_wrong_key_and_unknown_template(service: DevVm) -> None:
    with pytest.raises(AuthenticationException):
        Sandbox.list(api_key="e2b_" + "0" * 40).next_items()
    with pytest.raises(SandboxException, match="nosuch"):
        Sandbox.create(template="nosuch", request_timeout=PATIENCE_S)
