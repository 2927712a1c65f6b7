"""Pause, resume, snapshots and forks by the unmodified E2B SDK, with real guests."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from typing import Any

import pytest
from dev_vm import DevVm
from e2b import Sandbox, SandboxQuery, SandboxState

from vmcell_tools.leak_check import leaks

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PATIENCE_S = 300
COUNTER = "i=0; while :; do i=$((i+1)); echo $i >> /home/user/steps; sleep 0.5; done"
IDENTITY = (
    "cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id || echo none; "
    "od -An -tx1 -N16 /dev/urandom; hostname -I"
)


def _create(template: str = "base", **options: Any) -> Sandbox:
    return Sandbox.create(template, timeout=900, request_timeout=PATIENCE_S, **options)


def _run(sandbox: Sandbox, command: str) -> str:
    return sandbox.commands.run(command, timeout=PATIENCE_S, request_timeout=PATIENCE_S).stdout


def _start_counter(sandbox: Sandbox) -> None:
    _run(sandbox, "touch /home/user/steps")
    sandbox.commands.run(COUNTER, background=True, request_timeout=PATIENCE_S)


def _steps(sandbox: Sandbox, more: int = 0) -> int:
    """How far the counter is once it has done so many more; each step is there once."""
    count = "wc -l < /home/user/steps"
    wait = f"n=$({count}); until [ $({count}) -ge $((n+{more})) ]; do sleep 0.2; done"
    found = _run(sandbox, f"{wait}; cat /home/user/steps").split()
    assert found == [str(number) for number in range(1, len(found) + 1)]
    return len(found)


def _states(service: DevVm) -> dict[str, SandboxState]:
    query = SandboxQuery(state=[SandboxState.RUNNING, SandboxState.PAUSED])
    return {row.sandbox_id: row.state for row in Sandbox.list(query=query).next_items()}


def _ask(service: DevVm, method: str, path: str, body: object = None) -> Any:
    request = urllib.request.Request(
        f"{service.api_url}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"X-API-KEY": os.environ["E2B_API_KEY"], "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@pytest.mark.deep
def test_pause_and_resume(service: DevVm) -> None:
    before = service.inventory()
    sandbox = _create(envs={"COLOUR": "red"}, metadata={"kept": "yes"})
    _start_counter(sandbox)
    at_pause = _steps(sandbox, 3)
    sandbox.pause(request_timeout=PATIENCE_S)
    assert _states(service)[sandbox.sandbox_id] is SandboxState.PAUSED
    assert service.check("ctr", "-n", "vmcell", "tasks", "list", "-q").split() == []
    time.sleep(3)  # the guest is not to notice
    again = Sandbox.connect(sandbox.sandbox_id, timeout=900, request_timeout=PATIENCE_S)
    assert _states(service)[sandbox.sandbox_id] is SandboxState.RUNNING
    assert at_pause + 3 <= _steps(again, 3)
    before_s = float(service.check("date", "+%s.%N"))
    inside_s = float(_run(again, "date +%s.%N"))
    after_s = float(service.check("date", "+%s.%N"))
    assert before_s - 0.1 <= inside_s <= after_s + 0.1
    assert again.get_info(request_timeout=PATIENCE_S).metadata == {"kept": "yes"}
    assert _run(again, "echo $COLOUR") == "red\n"
    assert again.kill(request_timeout=PATIENCE_S)
    assert not leaks(before, service.inventory())


def test_snapshots_forks_and_rollback(service: DevVm) -> None:
    sandbox = _create()
    made: list[Sandbox] = [sandbox]
    try:
        _start_counter(sandbox)
        sandbox.files.write("/home/user/note", "first", request_timeout=PATIENCE_S)
        at_snapshot = _steps(sandbox, 3)
        snapshot = sandbox.create_snapshot(request_timeout=PATIENCE_S)
        sandbox.files.write("/home/user/note", "second", request_timeout=PATIENCE_S)
        forks = sandbox.fork(count=2, timeout=900, request_timeout=PATIENCE_S)
        made += forks
        restored = _create(snapshot.snapshot_id)
        made.append(restored)
        notes = [_run(row, "cat /home/user/note") for row in made]
        assert notes == ["second", "second", "second", "first"]
        for row in made:
            assert _steps(row, 3) > at_snapshot
        identities = [_run(row, IDENTITY).splitlines() for row in made]
        for values in zip(*identities, strict=True):
            assert len(set(values)) == len(values), identities
        path = f"/vmcell/sandboxes/{sandbox.sandbox_id}"
        _ask(service, "POST", f"{path}/rollback", {"snapshotID": snapshot.snapshot_id})
        assert _run(sandbox, "cat /home/user/note") == "first"
        _ask(service, "POST", f"{path}/undo", {})
        assert _run(sandbox, "cat /home/user/note") == "second"
        assert Sandbox.delete_snapshot(snapshot.snapshot_id, request_timeout=PATIENCE_S)
    finally:
        for row in made:
            row.kill(request_timeout=PATIENCE_S)
