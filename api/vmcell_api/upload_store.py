"""Files that clients upload for COPY: straight to disk, bounded, a team's own.

A client asks for a link, then PUTs a tar to it without any key. The link's token is random, kept as
its hash and good for one hour. A file appears under its name when all of it is there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from vmcell_api.json_body import BodyTooLarge, Readable
from vmcell_protos.errors import CallerError, HostError

PREFIX = "/vmcell/uploads/"
LINK_LIFE_MS = 3600 * 1000
# An upload that no build has asked about for so long is removed.
KEPT_S = 7 * 24 * 3600
PIECE_BYTES = 1 << 20
_PARTIAL = ".partial-"


class UploadStore:
    """The folder `<upload_dir>/<team id>/<files hash>`; thread-safe."""

    def __init__(self, upload_dir: str, *, limit_mib: int) -> None:
        self._folder = Path(upload_dir)
        self._limit_bytes = limit_mib << 20

    def present(self, team_id: str, files_hash: str) -> bool:
        """Whether the team has uploaded it; that counts as a use."""
        try:
            os.utime(self._folder / team_id / files_hash)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise HostError(f"cannot look for upload {files_hash}: {error}") from error
        return True

    def receive(
        self, team_id: str, files_hash: str, stream: Readable, content_length: int | None
    ) -> int:
        """Writes the body; answers its size in bytes.

        Raises BodyTooLarge beyond the limit, CallerError for a body that ends early, HostError for
        a disk that does not take it; then nothing of it is left.
        """
        if content_length is not None and content_length > self._limit_bytes:
            raise self._too_large()
        folder = self._folder / team_id
        partial = folder / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._expire(folder)
            try:
                size = self._write(partial, stream)
                if content_length is not None and size != content_length:
                    raise CallerError(
                        f"the upload ended after {size} of {content_length} bytes; send it again"
                    )
                partial.rename(folder / files_hash)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
        except OSError as error:
            raise HostError(f"the upload could not be written: {error}") from error
        return size

    def _write(self, partial: Path, stream: Readable) -> int:
        size = 0
        with partial.open("xb") as file:
            while True:
                try:
                    piece = stream.read(PIECE_BYTES)
                except OSError as error:
                    raise CallerError(
                        f"the upload stopped after {size} bytes ({error}); send it again"
                    ) from error
                if not piece:
                    return size
                size += len(piece)
                if size > self._limit_bytes:
                    raise self._too_large()
                file.write(piece)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the upload has more than {self._limit_bytes >> 20} MiB; copy less, or raise "
            "max_upload_mib in api.toml"
        )

    def _expire(self, folder: Path) -> None:
        """Removes what is old, and partial files of workers that died."""
        oldest = time.time() - KEPT_S
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker was first
                if entry.stat().st_mtime < oldest:
                    entry.unlink()
