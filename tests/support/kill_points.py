"""The points of noded's and the API's verbs at which a process is killed (SIGKILL) by tests.

Each point is a call that noded or the API makes; `arm()` wraps it so that this very process dies
there. The wrapped call is only deadly inside the verb, so that what comes before it works.
`leaves` says what the next process must find: "nothing", the "whole" sandbox running, or "paused".
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

BEFORE, DURING, AFTER = "before", "during", "after"
NOTHING, WHOLE, PAUSED = "nothing", "whole", "paused"
# Well inside what runc needs for a task, and long enough for the call to have reached containerd.
DURING_S = 0.03

NODE, BUILD = "vmcell_api.node.node:Node", "vmcell_api.node.build:SandboxBuilder"
DAEMON, SLOTS = "vmcell_api.node.containerd:Containerd", "vmcell_api.node.slots:SlotPool"
FILES, GUEST = "vmcell_api.node.sandbox_files:", "vmcell_api.node.guest_init:"
PLANE, CLIENT = "vmcell_api.control_plane:ControlPlane", "vmcell_api.node_client:NodeClient"
RECORDS = "vmcell_api.node.snapshot_records:SnapshotRecords"
SUSPENSION = "vmcell_api.node.suspension:Suspension"
REMOVALS = "vmcell_api.node.removal:Removals"
ONCE = "vmcell_api.create_once:CreateOnce"
ROWS = "vmcell_api.store.snapshot_rows:SnapshotRows"
STORE, KEYS = "vmcell_api.store.records:Store", "vmcell_api.store.create_keys:CreateKeys"

SAVING_VERBS = {name: NODE for name in ("pause", "resume", "snapshot", "rollback")}
NODED_VERBS = {"create": NODE, "kill": NODE, **SAVING_VERBS}
API_VERBS = {"create": ONCE, "kill": PLANE}


@dataclass(frozen=True, kw_only=True)
class Point:
    """`owner` is "module:class" (or "module:"), whose function `call` is deadly inside `verb`."""

    verb: str
    owner: str
    call: str
    when: str = AFTER
    leaves: str = NOTHING


NODED_POINTS = {
    "create: image looked up": Point(verb="create", owner=BUILD, call="image_config"),
    "create: slot claimed": Point(verb="create", owner=SLOTS, call="claim"),
    "create: files written": Point(verb="create", owner=FILES, call="write"),
    "create: lease taken": Point(verb="create", owner=DAEMON, call="create_lease"),
    "create: snapshot prepared": Point(verb="create", owner=DAEMON, call="prepare_snapshot"),
    "create: container written": Point(verb="create", owner=DAEMON, call="create_container"),
    "create: lease given back": Point(verb="create", owner=DAEMON, call="delete_lease"),
    "create: task in the making": Point(
        verb="create", owner=DAEMON, call="create_task", when=DURING
    ),
    "create: task made": Point(verb="create", owner=DAEMON, call="create_task"),
    "create: task at its start": Point(verb="create", owner=DAEMON, call="start_task", when=DURING),
    "create: task started": Point(verb="create", owner=DAEMON, call="start_task"),
    "create: guest initialised": Point(verb="create", owner=GUEST, call="initialise"),
    "create: labelled running": Point(verb="create", owner=DAEMON, call="set_labels", leaves=WHOLE),
    "kill: before anything": Point(
        verb="kill", owner=DAEMON, call="kill_task", when=BEFORE, leaves=WHOLE
    ),
    "kill: task killed": Point(verb="kill", owner=DAEMON, call="kill_task"),
    "kill: task deleted": Point(verb="kill", owner=DAEMON, call="delete_task"),
    "kill: container deleted": Point(verb="kill", owner=DAEMON, call="delete_container"),
    "kill: snapshot removed": Point(verb="kill", owner=DAEMON, call="remove_snapshot"),
    "kill: lease deleted": Point(verb="kill", owner=DAEMON, call="delete_lease"),
    "kill: files removed": Point(verb="kill", owner=FILES, call="remove"),
    "kill: slot released": Point(verb="kill", owner=SLOTS, call="release"),
}
_SAVE_POINTS = {
    "record written": (RECORDS, "_write", AFTER),
    "lease taken": (DAEMON, "create_lease", AFTER),
    "layers kept": (DAEMON, "keep_layers", AFTER),
    "saving": (DAEMON, "checkpoint_task", DURING),
    "saved": (DAEMON, "checkpoint_task", AFTER),
}
SAVING_POINTS = {
    **{
        f"{verb}: {name}": Point(verb=verb, owner=owner, call=call, when=when, leaves=WHOLE)
        for verb in ("pause", "snapshot", "rollback")
        for name, (owner, call, when) in _SAVE_POINTS.items()
    },
    "pause: labelled pausing": Point(verb="pause", owner=DAEMON, call="set_labels", leaves=WHOLE),
    "pause: before it counts": Point(
        verb="pause", owner=SUSPENSION, call="commit_pause", when=BEFORE, leaves=WHOLE
    ),
    "pause: it counts": Point(verb="pause", owner=SUSPENSION, call="commit_pause", leaves=PAUSED),
    "pause: task killed": Point(verb="pause", owner=DAEMON, call="kill_task", leaves=PAUSED),
    "pause: task deleted": Point(verb="pause", owner=DAEMON, call="delete_task", leaves=PAUSED),
    "pause: slot released": Point(verb="pause", owner=SLOTS, call="release", leaves=PAUSED),
    **{
        f"resume: {name}": Point(verb="resume", owner=owner, call=call, when=when, leaves=PAUSED)
        for name, (owner, call, when) in {
            "slot claimed": (SLOTS, "claim", AFTER),
            "files written": (FILES, "write", AFTER),
            "old disk removed": (DAEMON, "remove_snapshot", AFTER),
            "disk prepared": (DAEMON, "prepare_snapshot", AFTER),
            "container rewritten": (DAEMON, "rewrite_container", AFTER),
            "task in the making": (DAEMON, "create_task", DURING),
            "task made": (DAEMON, "create_task", AFTER),
            "task started": (DAEMON, "start_task", AFTER),
            "guest initialised": (GUEST, "initialise", AFTER),
        }.items()
    },
    "resume: labelled running": Point(verb="resume", owner=DAEMON, call="set_labels", leaves=WHOLE),
    "resume: snapshot removed": Point(verb="resume", owner=RECORDS, call="remove", leaves=WHOLE),
    **{
        f"rollback: {name}": Point(verb="rollback", owner=owner, call=call, when=when, leaves=WHOLE)
        for name, (owner, call, when) in {
            "slot claimed": (SLOTS, "claim", AFTER),
            "container written": (DAEMON, "create_container", AFTER),
            "task started": (DAEMON, "start_task", AFTER),
            "restored beside": (BUILD, "restore_beside", AFTER),
            "undo point saved": (SUSPENSION, "begin", AFTER),
            "swapped": (REMOVALS, "remove", BEFORE),
            "old task killed": (DAEMON, "kill_task", AFTER),
            "old container deleted": (DAEMON, "delete_container", AFTER),
            "old slot released": (SLOTS, "release", AFTER),
        }.items()
    },
}
PLANES = "vmcell_api.snapshot_plane:SnapshotPlane"
SAVING_API_VERBS = {name: PLANES for name in ("pause", "fork", "make")}
SAVING_API_POINTS = {
    "pause: node at work": Point(verb="pause", owner=CLIENT, call="pause", when=DURING),
    "pause: node done": Point(verb="pause", owner=CLIENT, call="pause"),
    "make: row written": Point(verb="make", owner=ROWS, call="add"),
    "make: node at work": Point(verb="make", owner=CLIENT, call="make_snapshot", when=DURING),
    "make: node done": Point(verb="make", owner=CLIENT, call="make_snapshot"),
    "make: row marked": Point(verb="make", owner=ROWS, call="mark_made"),
    "fork: node at work": Point(verb="fork", owner=CLIENT, call="make_snapshot", when=DURING),
    "fork: snapshot made": Point(verb="fork", owner=CLIENT, call="make_snapshot"),
    "fork: copies made": Point(verb="fork", owner=CLIENT, call="remove_snapshot", when=BEFORE),
    "fork: snapshot removed": Point(verb="fork", owner=CLIENT, call="remove_snapshot"),
}
API_POINTS = {
    "create: key taken": Point(verb="create", owner=KEYS, call="take"),
    "create: row written": Point(verb="create", owner=STORE, call="add_sandbox"),
    "create: node at work": Point(
        verb="create", owner=CLIENT, call="create", when=DURING, leaves=WHOLE
    ),
    "create: node done": Point(verb="create", owner=CLIENT, call="create", leaves=WHOLE),
    "create: row marked": Point(verb="create", owner=STORE, call="mark_built", leaves=WHOLE),
    "create: key marked": Point(verb="create", owner=KEYS, call="mark_done", leaves=WHOLE),
    "kill: before the node": Point(
        verb="kill", owner=CLIENT, call="kill", when=BEFORE, leaves=WHOLE
    ),
    "kill: node done": Point(verb="kill", owner=CLIENT, call="kill"),
    "kill: row forgotten": Point(verb="kill", owner=STORE, call="forget_sandboxes"),
}

_inside = threading.local()


def arm(point: Point, verbs: dict[str, str]) -> None:
    """From now on this process dies at `point`; `verbs` says whose "create" and "kill" count."""
    for verb, owner in verbs.items():
        _wrap(owner, verb, functools.partial(_in_verb, verb))
    _wrap(point.owner, point.call, functools.partial(_deadly, point))


def _in_verb(verb: str, original: Callable, *arguments: object, **options: object) -> object:
    _inside.verb = verb
    try:
        return original(*arguments, **options)
    finally:
        _inside.verb = None


def _deadly(point: Point, original: Callable, *arguments: object, **options: object) -> object:
    if getattr(_inside, "verb", None) != point.verb:
        return original(*arguments, **options)
    if point.when == BEFORE:
        _die()
    if point.when == DURING:
        threading.Timer(DURING_S, _die).start()
    original(*arguments, **options)
    return _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: str, name: str, around: Callable) -> None:
    module_name, _, class_name = owner.partition(":")
    module = importlib.import_module(module_name)
    place = getattr(module, class_name) if class_name else module
    original = getattr(place, name)

    @functools.wraps(original)
    def wrapped(*arguments: object, **options: object) -> object:
        return around(original, *arguments, **options)

    setattr(place, name, wrapped)
