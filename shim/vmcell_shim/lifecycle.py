"""What may be asked of a process in which state: one table, no I/O, no threads.

The init of a container and every exec follow the same states. `creating` lasts as long as the VM
takes to boot, `starting` until the guest has answered; both exist so that no lock is held across
them. Source: containerd runtime/v2/runc (init_state.go, exec_state.go); its tests rely on it.

    creating ──created──▶ created ──start──▶ starting ──started──▶ running
        │                    │ ▲                │                     │
        │                    │ └─start_failed───┤                     │
        └──exit──────────────┴─────exit─────────┴────────exit─────────┴──▶ stopped ──▶ deleted
"""

from __future__ import annotations

from vmcell_protos.errors import CallerError
from vmcell_protos.task import (
    TaskStatus_CREATED,
    TaskStatus_RUNNING,
    TaskStatus_STOPPED,
)

CREATING, CREATED, STARTING = "creating", "created", "starting"
RUNNING, STOPPED, DELETED = "running", "stopped", "deleted"

# state → operation → next state. What is missing here is refused by REFUSALS.
TRANSITIONS: dict[str, dict[str, str]] = {
    CREATING: {"created": CREATED, "exit": STOPPED, "kill": CREATING},
    CREATED: {
        "start": STARTING,
        "delete": DELETED,
        "kill": CREATED,
        "add_exec": CREATED,
        "resize": CREATED,
        "exit": STOPPED,
    },
    STARTING: {
        "started": RUNNING,
        "start_failed": CREATED,
        "add_exec": STARTING,
        "resize": STARTING,
        "exit": STOPPED,
    },
    RUNNING: {
        "kill": RUNNING,
        "add_exec": RUNNING,
        "resize": RUNNING,
        "stats": RUNNING,
        "exit": STOPPED,
    },
    STOPPED: {"delete": DELETED, "resize": STOPPED},
    DELETED: {"delete_failed": STOPPED},
}

# (state, operation) → code of the refusal; everything else is failed_precondition.
REFUSALS: dict[tuple[str, str], str] = {
    (STOPPED, "kill"): "not_found",
    (DELETED, "kill"): "not_found",
    (DELETED, "delete"): "not_found",
}

# What Task.State answers.
STATUS: dict[str, int] = {
    CREATING: TaskStatus_CREATED,
    CREATED: TaskStatus_CREATED,
    STARTING: TaskStatus_CREATED,
    RUNNING: TaskStatus_RUNNING,
    STOPPED: TaskStatus_STOPPED,
    DELETED: TaskStatus_STOPPED,
}


def next_state(state: str, operation: str, name: str) -> str:
    """The state after `operation`; `name` is the process's, for the refusal (CallerError)."""
    following = TRANSITIONS[state].get(operation)
    if following is None:
        code = REFUSALS.get((state, operation), "failed_precondition")
        raise CallerError(f"cannot {operation.replace('_', ' ')} {name}: it is {state}", code=code)
    return following
