"""EntryInfo of one path (E2B filesystem.proto): what Stat, ListDir, MakeDir, Move, watch tell."""

from __future__ import annotations

import os
import posixpath
import stat

from .accounts import Accounts
from .wire.gotext import file_mode_text, rfc3339

METADATA_PREFIX = "user.e2b."


def read_metadata(path: str) -> dict[str, str]:
    """The client's own key-value pairs of a file: xattrs `user.e2b.<key>`; {} where none can be."""
    try:
        names = [name for name in os.listxattr(path) if name.startswith(METADATA_PREFIX)]
        return {
            name[len(METADATA_PREFIX) :]: os.getxattr(path, name).decode("utf-8", "replace")
            for name in names
        }
    except OSError:
        # No xattrs on this file system (ENOTSUP), no right to read them, or gone meanwhile.
        return {}


def _type_name(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return "FILE_TYPE_FILE"
    if stat.S_ISDIR(mode):
        return "FILE_TYPE_DIRECTORY"
    return None


def entry_info(path: str, accounts: Accounts) -> dict[str, object]:
    """The entry at the absolute `path`; raises OSError when there is none.

    Of a link, type and mode are the target's, everything else is its own. A dangling link has no
    type and is its own target.
    """
    own = os.lstat(path)
    mode, kind = own.st_mode, _type_name(own.st_mode)
    entry: dict[str, object] = {"name": posixpath.basename(path) or "/", "path": path}
    if stat.S_ISLNK(own.st_mode):
        entry["isSymlink"] = True
        try:
            mode = os.stat(path).st_mode
            entry["symlinkTarget"] = os.path.realpath(path)
        except OSError:
            entry["symlinkTarget"] = path
        kind = _type_name(mode)
    if kind is not None:
        entry["type"] = kind
    entry |= {
        "size": str(own.st_size),
        "mode": stat.S_IMODE(mode) & 0o777,
        "permissions": file_mode_text(own.st_mode),
        "owner": accounts.user_name(own.st_uid),
        "group": accounts.group_name(own.st_gid),
        "modifiedTime": rfc3339(own.st_mtime_ns),
    }
    if kind == "FILE_TYPE_FILE":
        metadata = read_metadata(path)
        if metadata:
            entry["metadata"] = metadata
    return entry
