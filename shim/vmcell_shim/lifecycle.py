"""What may be asked of a process in which state: one table, no I/O, no threads.

The init of a container and every exec follow the same states. `creating` lasts as long as the VM
takes to boot, `starting` until the guest has answered; both exist so that no lock is held across
them; `pausing`, `resuming` and `saving` likewise. Only an init is paused, and its execs with it;
from `saving` (a checkpoint, of a running or a paused one) either is next.
Source: containerd runtime/v2/runc (init_state.go, exec_state.go); its tests rely on it.

    creating ──created──▶ created ──start──▶ starting ──started──▶ running
        │                    │ ▲                │                     │
        │                    │ └─start_failed───┤                     │
        └──exit──────────────┴─────exit─────────┴────────exit─────────┴──▶ stopped ──▶ deleted
                                                                      │
                        running ──pause──▶ pausing ──paused──▶ paused ┤ exit
                           ▲ └──pause_failed──┘                │      │
                           └──resumed── resuming ◀───resume────┘──────┘
"""

from __future__ import annotations

from vmcell_protos.errors import CallerError
from vmcell_protos.task import (
    TaskStatus_CREATED,
    TaskStatus_PAUSED,
    TaskStatus_PAUSING,
    TaskStatus_RUNNING,
    TaskStatus_STOPPED,
)

CREATING, CREATED, STARTING = "creating", "created", "starting"
RUNNING, STOPPED, DELETED = "running", "stopped", "deleted"
PAUSING, PAUSED, RESUMING = "pausing", "paused", "resuming"
SAVING = "saving"

# state → operation → next state. What is missing here is refused by REFUSALS.
TRANSITIONS: dict[str, dict[str, str]] = {
    CREATING: {"created": CREATED, "exit": STOPPED, "kill": CREATING},
    CREATED: {
        "start": STARTING,
        "delete": DELETED,
        "kill": CREATED,
        "add_exec": CREATED,
        "update": CREATED,
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
        "start_an_exec_in": RUNNING,
        "resize": RUNNING,
        "stats": RUNNING,
        "update": RUNNING,
        "pause": PAUSING,
        "save": SAVING,
        "exit": STOPPED,
    },
    PAUSING: {"paused": PAUSED, "pause_failed": RUNNING, "kill": PAUSING, "exit": STOPPED},
    PAUSED: {
        "resume": RESUMING,
        "save": SAVING,
        "kill": PAUSED,
        "resize": PAUSED,
        "exit": STOPPED,
    },
    SAVING: {"saved": RUNNING, "saved_and_paused": PAUSED, "kill": SAVING, "exit": STOPPED},
    RESUMING: {"resumed": RUNNING, "resume_failed": PAUSED, "kill": RESUMING, "exit": STOPPED},
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
    PAUSING: TaskStatus_PAUSING,
    PAUSED: TaskStatus_PAUSED,
    RESUMING: TaskStatus_PAUSED,
    SAVING: TaskStatus_PAUSING,
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
