"""The unmodified E2B SDK on the host against the service in the dev VM."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from dev_vm import DevVm
from e2b import CommandExitException, NotFoundException, Sandbox
from e2b.exceptions import AuthenticationException, SandboxException

from vmcell_tools.leak_check import leaks

pytestmark = pytest.mark.vm

PATIENCE_S = 300


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


FAR = "93.184.216.34"
# A neighbour with a public address: what the guest sends there is routed and masqueraded.
FAR_UP = f"""
ip netns add far && ip link add far0 type veth peer name far1 netns far
ip addr add 93.184.216.33/30 dev far0 && ip link set far0 up
ip -n far addr add {FAR}/30 dev far1 && ip -n far link set far1 up
exec </dev/null >/dev/null 2>&1
cd / && setsid ip netns exec far python3 -m http.server 8000 --bind {FAR} &
"""


@pytest.fixture
def far(service: DevVm) -> Iterator[None]:
    service.check("sh", "-ec", FAR_UP)
    yield
    service.check("sh", "-c", "ip netns pids far | xargs -r kill; ip netns del far")


def test_network_rules_metrics_and_logs(service: DevVm, far: None) -> None:
    with _create(network={"allow_out": [FAR], "deny_out": ["0.0.0.0/0"]}) as sandbox:

        def reaches() -> bool:
            probe = f"timeout 4 bash -c '</dev/tcp/{FAR}/8000' && echo reached || echo closed"
            return sandbox.commands.run(probe, timeout=PATIENCE_S).stdout == "reached\n"

        assert reaches()
        sandbox.update_network({"deny_out": [f"{FAR}/32"]}, request_timeout=PATIENCE_S)
        assert not reaches()
        sandbox.update_network({}, request_timeout=PATIENCE_S)
        assert reaches()
        deadline = time.monotonic() + 60
        while not (found := sandbox.get_metrics(request_timeout=PATIENCE_S)):
            assert time.monotonic() < deadline, "no metrics came"
            time.sleep(0.5)
        assert 0 < found[0].mem_used < found[0].mem_total
        assert 0 < found[0].disk_used < found[0].disk_total
        request = urllib.request.Request(
            f"{service.api_url}/v2/sandboxes/{sandbox.sandbox_id}/logs?search=reached",
            headers={"X-API-KEY": os.environ["E2B_API_KEY"]},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            entries = json.load(answer)["logs"]
        outputs = [row for row in entries if row["fields"]["event"] == "process_output"]
        assert [row["message"] for row in outputs] == ["reached\n"] * 2


NODED_PID = "grep -o 'noded is process [0-9]*' /mnt/out/serve.log | tail -n 1 | grep -o '[0-9]*$'"


def test_noded_killed_while_a_guest_boots(service: DevVm) -> None:
    """The points of tests/api/test_kill_points.py, once with a machine in the making.

    The SDK may ask again by itself (it retries a 503): then it gets a whole sandbox.
    """
    before = service.inventory()
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(_create)
        deadline = time.monotonic() + 120
        while not service.check("ctr", "-n", "vmcell", "tasks", "list", "-q").split():
            assert time.monotonic() < deadline, "no task came"
            assert not making.done()
        noded = service.check("sh", "-c", NODED_PID).strip()
        service.check("kill", "-9", noded)
        if making.exception(PATIENCE_S) is None:
            again = making.result()
            assert again.commands.run("echo whole", timeout=PATIENCE_S).stdout == "whole\n"
            assert again.kill(request_timeout=PATIENCE_S)
    # `vmcell serve` starts another one, which settles what it finds.
    deadline = time.monotonic() + 120
    while service.check("sh", "-c", NODED_PID).strip() == noded:
        assert time.monotonic() < deadline, "noded was not started again"
    while left := leaks(before, service.inventory()):
        assert time.monotonic() < deadline, left
    assert Sandbox.list().next_items() == []


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
