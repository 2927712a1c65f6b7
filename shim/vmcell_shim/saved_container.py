"""What a container goes on from, where its spec or containerd names it.

The annotation `io.vmcell.snapshot` is the id of a snapshot of this host; a checkpoint image that
containerd has laid out for Task.Create is a directory.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.checkpoint_image import import_snapshot
from vmcell_shim.digests import snapshot_digests
from vmcell_shim.snapshot_store import SnapshotDraft, open_snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.snapshot_store import OpenSnapshot

# os.MkdirTemp of containerd's services/tasks/local.go.
_LAYOUT = re.compile(r"ctrd-checkpoint[0-9]+")


def open_saved(snapshot_id: str, checkpoint: str, config: ShimConfig) -> OpenSnapshot | None:
    """The verified snapshot, which the caller closes; None where none is named.

    Raises CallerError, HostError.
    """
    digests = snapshot_digests(config)
    if checkpoint:
        # The annotation may be there as well: a checkpoint brings its container's spec along, and
        # that container may have gone on from a snapshot itself.
        draft = SnapshotDraft(config.snapshot_dir, f"import-{secrets.token_hex(8)}")
        try:
            return import_snapshot(checkpoint, draft, digests)
        finally:
            draft.discard()
            _remove_layout(checkpoint)
    if not snapshot_id:
        return None
    try:
        return open_snapshot(config.snapshot_dir, snapshot_id, digests)
    except CallerError as error:
        if error.code == "not_found":
            # containerd would take it for a task that does not exist.
            raise CallerError(str(error), code="failed_precondition") from error
        raise


def _remove_layout(directory: str) -> None:
    """containerd (1.6 to 2.3) lays an image out in a new directory for each Create and never comes
    back to it: a copy of the guest's memory for each. One of another name is somebody's own."""
    if _LAYOUT.fullmatch(os.path.basename(directory)):
        shutil.rmtree(directory, ignore_errors=True)


class SavedRoot:
    """The root of a container that goes on from `saved`: the same images, a copy of its disk."""

    def __init__(self, saved: OpenSnapshot, config: ShimConfig) -> None:
        self._saved = saved
        self._config = config

    def disk_for(self, lowers: tuple[str, ...], *, writable: bool) -> str:
        """What the disk is a copy of, "" without one; CallerError unless the guest has seen these
        images, HostError when they cannot be read."""
        manifest, digests = self._saved.manifest, snapshot_digests(self._config)
        try:
            base_image = digests.of_path(self._config.base_image)
            images = tuple(digests.of_path(path) for path in lowers)
        except OSError as error:
            raise HostError(f"cannot read the images of {self._saved.id}: {error}") from error
        reason = ""
        if base_image != manifest.base_image:
            reason = "was made with another version of the base image; make it again"
        elif images != manifest.images:
            reason = "is of a container of another image; use the image it was made from"
        elif writable != manifest.disk:
            reason = f"has a root that is {'writable' if manifest.disk else 'read-only'}"
        if reason:
            raise CallerError(f"snapshot {self._saved.id} {reason}", code="failed_precondition")
        fd = self._saved.disk_fd
        return os.path.join("/proc/self/fd", str(fd)) if fd >= 0 else ""
