"""Which sandboxes have which volumes, so that none is removed under a sandbox.

A claim lasts from before the sandbox is built until it is gone whole; noded that starts anew makes
the claims again from the labels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.names import VolumeMount
from vmcell_protos.errors import CallerError

SHOWN = 10


class VolumeUse:
    """The volumes of this node and their users; thread-safe."""

    def __init__(self, folders: VolumeFolders) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._claims: dict[str, frozenset[str]] = {}

    def open(self) -> None:
        """Makes the directory; what earlier processes threw away is removed in the background."""
        self._folders.prepare()
        threading.Thread(target=self._folders.empty_trash, name="trash", daemon=True).start()

    def claim(self, sandbox_id: str, mounts: Sequence[VolumeMount]) -> None:
        """Says that a sandbox is to have them; CallerError for one that is not on this node."""
        with self._lock:
            for mount in mounts:
                if not self._folders.exists(mount.volume_id):
                    raise CallerError(
                        f"volume {mount.name!r} is not on this node; delete it and make it again",
                        code="failed_precondition",
                    )
            self.adopt(sandbox_id, mounts)

    def adopt(self, sandbox_id: str, mounts: Sequence[VolumeMount]) -> None:
        """Says that a sandbox has them, whether they are there or not."""
        if mounts:
            self._claims[sandbox_id] = frozenset(mount.volume_id for mount in mounts)

    def release(self, sandbox_id: str) -> None:
        """Says that a sandbox is gone; one without volumes is fine."""
        with self._lock:
            self._claims.pop(sandbox_id, None)

    def make(self, volume_id: str) -> None:
        """Makes an empty volume; one that is there stays as it is. Raises HostError."""
        with self._lock:
            self._folders.make(volume_id)

    def remove(self, volume_id: str) -> None:
        """Removes a volume, a missing one too; CallerError aborted, naming the sandboxes."""
        with self._lock:
            users = sorted(key for key, ids in self._claims.items() if volume_id in ids)
            if users:
                more = f" and {len(users) - SHOWN} more" if len(users) > SHOWN else ""
                raise CallerError(
                    f"the volume is mounted in {', '.join(users[:SHOWN])}{more}; kill them first",
                    code="aborted",
                )
            discarded = self._folders.discard(volume_id)
        if discarded is not None:
            self._folders.clear(discarded)
