"""Task.Checkpoint: a container is saved, then goes on, stands still or ends.

State `saving` lasts from the first to the last moment in which the guest may stand still; what is
told to the container meanwhile is held, but for SIGKILL. Digests are made afterwards.
"""

from __future__ import annotations

import os
import secrets

from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_shim.checkpoint import AS_BEFORE, EXIT, PAUSE, Checkpoint, Subject
from vmcell_shim.checkpoint_image import export_snapshot
from vmcell_shim.client import ConnectionLost
from vmcell_shim.digests import snapshot_digests
from vmcell_shim.lifecycle import DELETED, PAUSED, STOPPED
from vmcell_shim.process import SIGKILL
from vmcell_shim.snapshot_manifest import ID
from vmcell_shim.snapshot_store import SnapshotDraft, open_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.checkpoint import CheckpointOptions
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.container import Container
    from vmcell_shim.journal import Journal


def save_container(
    container: Container,
    options: CheckpointOptions,
    directory: str,
    config: ShimConfig,
    journal: Journal,
) -> None:
    """A snapshot of this host, or with options that name none the content of `directory`.

    Raises VmcellError: the container goes on then as it was, and nothing of the snapshot is left.
    """
    if not options.snapshot_id and not os.path.isdir(directory):
        raise CallerError(
            f"Checkpoint of {container.id} names neither a snapshot nor a directory: {directory!r}"
        )
    subject = _subject(container)
    snapshot_id = options.snapshot_id or f"export-{secrets.token_hex(8)}"
    draft = SnapshotDraft(config.snapshot_dir, snapshot_id)
    try:
        checkpoint = Checkpoint(subject, draft, config, journal)
        was_paused = container.init.advance("save") == PAUSED
        files = container.sandbox.files
        try:
            files.add_draft(draft.directory)
            _save(container, checkpoint, options, journal, was_paused=was_paused)
            checkpoint.finish()
            _publish(draft, "" if options.snapshot_id else directory, config)
        finally:
            files.drop_draft(draft.directory)
    finally:
        draft.discard()
    if options.then == EXIT:
        _end(container)


def _publish(draft: SnapshotDraft, directory: str, config: ShimConfig) -> None:
    """The snapshot is where it was wanted. Raises VmcellError."""
    if directory:
        snapshot = open_directory(draft.directory, draft.id, snapshot_digests(config))
        try:
            export_snapshot(snapshot, directory)
        finally:
            snapshot.close()
        return
    try:
        draft.commit()
    except OSError as error:
        raise HostError(f"cannot finish snapshot {draft.id}: {error}") from error


def _end(container: Container) -> None:
    try:
        container.kill(container.init, SIGKILL, everyone=True)
    except CallerError as error:
        if error.code != "not_found":
            raise
        # It has ended by itself, which is what was asked for.


def _refuse_what_has_no_copy(container: Container) -> None:
    reason = ""
    if container.sandbox.is_pod:
        reason = (
            "it shares its microVM with the other containers of a pod; save one that is alone in "
            "its own"
        )
    elif container.sandbox.has_live_directories:
        reason = "it has live directories of the host, which a snapshot cannot hold"
    elif container.images is not None and container.images.block_device:
        reason = (
            f"its root is the disk {container.images.block_device} itself; use the overlayfs, "
            "erofs or native snapshotter"
        )
    if reason:
        raise CallerError(f"cannot save {container.id}: {reason}", code="unimplemented")


def _subject(container: Container) -> Subject:
    _refuse_what_has_no_copy(container)
    if container.images is None:
        raise CallerError(f"task {container.id} is not made yet", code="failed_precondition")
    parent = container.from_snapshot
    return Subject(
        container_id=container.id,
        guest=container.guest,
        images=container.images,
        vcpus=container.sandbox.vcpus,
        memory_mib=container.sandbox.memory_mib,
        macs=container.sandbox.macs,
        terminal=container.init.stdio.terminal,
        # What was imported has no id on this host.
        parent=parent if ID.fullmatch(parent) else "",
    )


def _save(
    container: Container,
    checkpoint: Checkpoint,
    options: CheckpointOptions,
    journal: Journal,
    *,
    was_paused: bool,
) -> None:
    stay = options.then in (PAUSE, EXIT) or (options.then == AS_BEFORE and was_paused)
    try:
        checkpoint.save(drop_caches=options.drop_caches)
    except BaseException:
        try:
            _end_save(container, paused=was_paused, was_paused=was_paused)
        except VmcellError as error:
            # What kept it from being saved is the one to be told.
            journal.error(f"{container.id} does not go on as before: {error}")
        raise
    _end_save(container, paused=stay, was_paused=was_paused)


def _end_save(container: Container, *, paused: bool, was_paused: bool) -> None:
    """It goes on, or stands still as if paused; so it does too where it cannot be made to go on,
    which raises VmcellError."""
    guest = container.guest
    if container.init.state in (STOPPED, DELETED):
        return
    try:
        if paused and not guest.stands_still:
            guest.pause()
        elif not paused and guest.stands_still:
            guest.resume()
    except BaseException as error:
        # Whoever waits for the process tells its end.
        if not (isinstance(error, ConnectionLost) or guest.ended.is_set()):
            container.end_save(goes_on=False, was_paused=was_paused)
        raise
    container.end_save(goes_on=not paused, was_paused=was_paused)
