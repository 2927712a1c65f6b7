"""The table of states against what containerd's own shim allows (shim-contract 3.4)."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_shim import lifecycle
from vmcell_shim.lifecycle import (
    CREATED,
    CREATING,
    DELETED,
    RUNNING,
    STARTING,
    STOPPED,
    TRANSITIONS,
    next_state,
)
from vmcell_shim.process import Process
from vmcell_shim.stdio import Stdio, StreamOwner

OWNER = StreamOwner(namespace="test", container_id="c1", warn=print)

OPERATIONS = sorted({operation for row in TRANSITIONS.values() for operation in row})
ASKED_BY_CONTAINERD = ("start", "kill", "delete", "add_exec", "stats")

ALLOWED = {
    CREATED: {"start", "kill", "delete", "add_exec"},
    RUNNING: {"kill", "add_exec", "stats"},
    STOPPED: {"delete"},
    DELETED: set(),
}
CODES = {
    (STOPPED, "kill"): "not_found",
    (RUNNING, "delete"): "failed_precondition",
    (RUNNING, "start"): "failed_precondition",
    (STOPPED, "start"): "failed_precondition",
    (STOPPED, "add_exec"): "failed_precondition",
    (DELETED, "delete"): "not_found",
}


@pytest.mark.parametrize("state", ALLOWED)
@pytest.mark.parametrize("operation", ASKED_BY_CONTAINERD)
def test_what_containerd_may_ask(state: str, operation: str) -> None:
    if operation in ALLOWED[state]:
        assert next_state(state, operation, "task c1") in TRANSITIONS
        return
    with pytest.raises(CallerError, match=f"task c1: it is {state}") as caught:
        next_state(state, operation, "task c1")
    assert caught.value.code == CODES.get((state, operation), caught.value.code)


def test_every_state_has_a_status() -> None:
    assert set(lifecycle.STATUS) == set(TRANSITIONS)
    assert {state for row in TRANSITIONS.values() for state in row.values()} <= set(TRANSITIONS)


@given(st.lists(st.sampled_from(OPERATIONS), max_size=30))
def test_any_sequence_keeps_the_order(operations: list[str]) -> None:
    """Nothing runs before it was created, nothing starts twice, and the end is the end."""
    state, started, ended = CREATING, 0, False
    for operation in operations:
        before = state
        try:
            state = next_state(state, operation, "task c1")
        except CallerError:
            assert state == before
            continue
        started += operation == "started"
        ended = ended or state == STOPPED
        assert started <= 1
        if ended:
            assert state in (STOPPED, DELETED)
        if operation == "started":
            assert before == STARTING
        if before == DELETED:
            assert operation == "delete_failed"


def test_a_deleted_created_process_has_its_status_when_waiters_wake() -> None:
    """The status stands under the same lock as the state: a waiter never reads 0."""
    seen: list[int] = []

    class Spy(threading.Condition):
        def notify_all(self) -> None:
            seen.append(process.exit_status)
            super().notify_all()

    process = Process("c1", "", Stdio(stdin="", stdout="", stderr="", terminal=False, owner=OWNER))
    process.advance("created")
    process._condition = Spy()
    process.advance("delete")
    assert seen == [137]
    assert process.exited_at_ns > 0
    process.stdio.close()
