"""The points of a Checkpoint and of a Create that goes on from one at which a shim or its VMM dies.

Runs in the shim: `arm()` wraps a call for each point. What is to die at which is said by the file
`doom` beside the shim's configuration; whoever dies takes that file away first.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

SHIM, VMM = "shim", "vmm"
BEFORE, AFTER = "before", "after"

GUEST, DRAFT = "vmcell_shim.guest:Guest", "vmcell_shim.snapshot_store:SnapshotDraft"
CHECKPOINT, SAVING = "vmcell_shim.checkpoint:Checkpoint", "vmcell_shim.saving:"
SAVED, CONTAINER = "vmcell_shim.saved_container:", "vmcell_shim.container:Container"
FOOTPRINT = "vmcell_shim.footprint:Footprint"


@dataclass(frozen=True, kw_only=True)
class Point:
    """`owner` is "module:class" (or "module:"), whose function `call` is the deadly one."""

    owner: str
    call: str
    when: str = AFTER


# In a Checkpoint, in this order.
SAVE_POINTS = {
    "a draft": Point(owner=DRAFT, call="__init__"),
    "memory copied": Point(owner=GUEST, call="copy_memory"),
    "told to stand still": Point(owner=GUEST, call="stand_still", when=BEFORE),
    "stands still": Point(owner=GUEST, call="stand_still"),
    "written": Point(owner=GUEST, call="save"),
    "disk copied": Point(owner=CHECKPOINT, call="_copy_disk"),
    "told to go on": Point(owner=SAVING, call="_end_save", when=BEFORE),
    "goes on": Point(owner=SAVING, call="_end_save"),
    "digests made": Point(owner=DRAFT, call="saved_files"),
    "sealed": Point(owner=DRAFT, call="seal"),
}
# The last of one that becomes a snapshot of this host, and of one that is exported.
COMMIT_POINTS = {
    "to be committed": Point(owner=DRAFT, call="commit", when=BEFORE),
    "committed": Point(owner=DRAFT, call="commit"),
}
EXPORT_POINTS = {
    "to be exported": Point(owner=SAVING, call="export_snapshot", when=BEFORE),
    "exported": Point(owner=SAVING, call="export_snapshot"),
}
# In a Create, and "woken" in Start.
RESTORE_POINTS = {
    "unpacked": Point(owner="vmcell_shim.checkpoint_image:", call="_unpack"),
    "imported": Point(owner=SAVED, call="import_snapshot"),
    "files noted": Point(owner=FOOTPRINT, call="open"),
    "disk made": Point(owner=FOOTPRINT, call="images"),
    "spawned": Point(owner=GUEST, call="_spawn"),
    "says hello": Point(owner=GUEST, call="boot"),
    "devices known": Point(owner=FOOTPRINT, call="attach"),
    "adopted": Point(owner="vmcell_shim.container:", call="adopt"),
    "created": Point(owner=CONTAINER, call="create"),
    "to be woken": Point(owner=GUEST, call="wake", when=BEFORE),
    "woken": Point(owner=GUEST, call="wake"),
}
POINTS = {**SAVE_POINTS, **COMMIT_POINTS, **EXPORT_POINTS, **RESTORE_POINTS}


def arm() -> None:
    """From now on this process looks at each point whether it is the one."""
    for name, point in POINTS.items():
        module_name, _, class_name = point.owner.partition(":")
        module = importlib.import_module(module_name)
        place = getattr(module, class_name) if class_name else module
        setattr(place, point.call, _wrapped(name, point, getattr(place, point.call)))


def _wrapped(name: str, point: Point, original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapped(*arguments: object, **options: object) -> object:
        if point.when == BEFORE:
            _look(name, arguments)
            return original(*arguments, **options)
        answer = original(*arguments, **options)
        _look(name, arguments)
        return answer

    return wrapped


def doom_file() -> str:
    return os.path.join(os.path.dirname(os.environ["VMCELL_CONFIG"]), "doom")


def _look(name: str, arguments: tuple[object, ...]) -> None:
    try:
        with open(doom_file(), encoding="utf-8") as file:
            who, point = json.load(file)
    except FileNotFoundError:
        return
    if point != name:
        return
    os.unlink(doom_file())
    if who == SHIM:
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(_vmm_of(arguments), signal.SIGKILL)


def _vmm_of(arguments: tuple[object, ...]) -> int:
    """The VMM's pid, by way of a guest that one of the arguments is or has."""
    from vmcell_shim.guest import Guest

    for argument in arguments:
        subject = getattr(argument, "_subject", argument)
        for guest in (subject, *(getattr(subject, name, None) for name in ("guest", "_guest"))):
            if isinstance(guest, Guest):
                return guest.pid
    raise LookupError(f"no guest in {arguments}")
