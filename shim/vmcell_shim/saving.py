"""Task.Checkpoint: a container is saved, then goes on, stands still or ends.

State `saving` lasts from the first to the last moment in which the guest may stand still; what is
told to the container meanwhile is held, but for SIGKILL. Digests are made afterwards.
"""

from __future__ import annotations

import secrets

from vmcell_protos.errors import CallerError
from vmcell_shim.checkpoint import AS_BEFORE, EXIT, PAUSE, Checkpoint, Subject
from vmcell_shim.checkpoint_image import export_snapshot
from vmcell_shim.digests import snapshot_digests
from vmcell_shim.lifecycle import PAUSED
from vmcell_shim.process import SIGKILL
from vmcell_shim.snapshot_store import SnapshotDraft, open_snapshot, remove_snapshot

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
    if container.sandbox.is_pod:
        raise CallerError(
            f"cannot save {container.id}: it shares its microVM with the other containers of a "
            "pod; save one that is alone in its own",
            code="unimplemented",
        )
    snapshot_id = options.snapshot_id or f"export-{secrets.token_hex(8)}"
    subject = _subject(container)
    draft = SnapshotDraft(config.snapshot_dir, snapshot_id)
    checkpoint = Checkpoint(subject, draft, config, journal)
    try:
        _save(container, checkpoint, options)
        checkpoint.finish()
    finally:
        checkpoint.discard()
    if not options.snapshot_id:
        try:
            _export(snapshot_id, directory, config)
        finally:
            remove_snapshot(config.snapshot_dir, snapshot_id)
    if options.then == EXIT:
        container.kill(container.init, SIGKILL, everyone=True)


def _subject(container: Container) -> Subject:
    if container.images is None:
        raise CallerError(f"task {container.id} is not made yet", code="failed_precondition")
    return Subject(
        container_id=container.id,
        guest=container.guest,
        images=container.images,
        vcpus=container.sandbox.vcpus,
        memory_mib=container.sandbox.memory_mib,
        macs=container.sandbox.macs,
        terminal=container.init.stdio.terminal,
        parent=container.from_snapshot,
    )


def _save(container: Container, checkpoint: Checkpoint, options: CheckpointOptions) -> None:
    was_paused = container.init.advance("save") == PAUSED
    stay = options.then in (PAUSE, EXIT) or (options.then == AS_BEFORE and was_paused)
    try:
        checkpoint.save(drop_caches=options.drop_caches)
    except BaseException:
        container.end_save(paused=was_paused, was_paused=was_paused)
        raise
    container.end_save(paused=stay, was_paused=was_paused)


def _export(snapshot_id: str, directory: str, config: ShimConfig) -> None:
    snapshot = open_snapshot(config.snapshot_dir, snapshot_id, snapshot_digests(config))
    try:
        export_snapshot(snapshot, directory)
    finally:
        snapshot.close()
