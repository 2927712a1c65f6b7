"""Where the volumes are: `data/<volume id>` below one directory that only root may pass.

Guests write there with any owner and mode, setuid root included; the closed directory is what keeps
the host's own users away from such files. `trash` and `uploads` are beside `data` because they must
be on the same file system.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vmcell_api.volumes import clearing
from vmcell_api.volumes.names import VOLUME_ID
from vmcell_protos.errors import HostError, VmcellError

log = logging.getLogger("vmcell.volumes")

DATA, TRASH, UPLOADS = "data", "trash", "uploads"
KEY_FILE = "token.key"
# Uid and gid of E2B's user in every sandbox; the other users of a guest may write as well.
OWNER = (1000, 1000)
ROOT_MODE = 0o777


class VolumeFolders:
    """The directories under `directory`; every method raises HostError."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    @property
    def key_path(self) -> str:
        """Where the key of the volume tokens is."""
        return str(self._directory / KEY_FILE)

    def path(self, volume_id: str) -> str:
        """The volume's directory, whether it is there or not."""
        if not VOLUME_ID.fullmatch(volume_id):
            raise HostError(f"{volume_id[:40]!r} is no volume id")
        return str(self._directory / DATA / volume_id)

    def prepare(self) -> None:
        """Makes what is missing, and closes the directory to everybody but us."""
        try:
            self._directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            self._directory.chmod(0o700)
            for name in (DATA, TRASH, UPLOADS):
                (self._directory / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot make the directory of volumes: {error}") from error

    def exists(self, volume_id: str) -> bool:
        """Whether the volume's directory is there; nothing else can be at that path."""
        return os.path.isdir(self.path(volume_id))

    def make(self, volume_id: str) -> None:
        """Makes an empty volume; one that is there stays as it is."""
        path = self.path(volume_id)
        try:
            os.mkdir(path, 0o700)
            if os.geteuid() == 0:
                os.chown(path, *OWNER)
            os.chmod(path, ROOT_MODE)
        except FileExistsError:
            return
        except OSError as error:
            raise HostError(f"cannot make volume {volume_id}: {error}") from error

    def discard(self, volume_id: str) -> str | None:
        """Takes a volume away at once, for `clear`; None where there is none."""
        self.path(volume_id)  # checks the id
        data = trash = -1
        try:
            data = self._open(DATA)
            trash = self._open(TRASH)
            return clearing.throw_away(data, volume_id, trash)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"cannot remove volume {volume_id}: {error}") from error
        finally:
            _close(data, trash)

    def clear(self, discarded: str) -> None:
        """Frees the space of what `discard` took away; may take long."""
        trash = -1
        try:
            trash = self._open(TRASH)
            clearing.clear(trash, discarded)
        except OSError as error:
            raise HostError(f"cannot remove the files of a volume: {error}") from error
        finally:
            _close(trash)

    def empty_trash(self) -> None:
        """Removes what earlier processes have thrown away and not removed; failures are logged."""
        self._empty(TRASH)

    def drop_uploads(self) -> None:
        """Removes what uploads have left that were cut off by our own end."""
        self._empty(UPLOADS)

    def _empty(self, name: str) -> None:
        folder = -1
        try:
            folder = self._open(name)
            clearing.empty(folder)
        except (OSError, VmcellError) as error:
            log.error("cannot empty %s of the volumes: %s", name, error)
        finally:
            _close(folder)

    def _open(self, name: str) -> int:
        return os.open(self._directory / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
