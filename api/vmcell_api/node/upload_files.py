"""What clients uploaded for COPY, as noded opens it.

The files lie in a folder of the API's user, who may be in the hands of an attacker: a file counts
only when it is a regular file of that user, reached without a symlink, so that noded, which is
root, hands no other file of the host into a guest.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import BinaryIO

from vmcell_api.node.build_steps import FILES_HASH
from vmcell_protos.errors import CallerError

TEAM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_GZIP_MAGIC = b"\x1f\x8b"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An open upload, the caller's to close; `packed`: it is gzip."""

    file: BinaryIO
    size: int
    packed: bool


def open_upload(upload_dir: str, team_id: str, files_hash: str, *, owner_uid: int) -> Upload:
    """Opens a team's upload; raises CallerError when there is none that may be used."""
    if not TEAM_ID.fullmatch(team_id) or not FILES_HASH.fullmatch(files_hash):
        raise CallerError(f"{files_hash[:80]!r} is no upload of a team")
    try:
        descriptor = _open(upload_dir, team_id, files_hash)
    except OSError as error:
        raise CallerError(
            f"the files of filesHash {files_hash} were not uploaded ({error.strerror}); "
            "ask GET /templates/{id}/files/{hash} and upload them first",
            code="failed_precondition",
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != owner_uid:
        os.close(descriptor)
        raise CallerError(f"upload {files_hash} is not a file of uid {owner_uid}")
    file = os.fdopen(descriptor, "rb")
    magic = file.read(len(_GZIP_MAGIC))
    file.seek(0)
    return Upload(file=file, size=status.st_size, packed=magic == _GZIP_MAGIC)


def _open(upload_dir: str, team_id: str, files_hash: str) -> int:
    folder = os.open(upload_dir, _DIRECTORY)
    try:
        team = os.open(team_id, _DIRECTORY, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        # Never waits for the other end of a fifo.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(files_hash, flags, dir_fd=team)
    finally:
        os.close(team)
