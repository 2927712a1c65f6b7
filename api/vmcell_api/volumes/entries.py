"""What a path in a volume is: E2B's VolumeEntryStat.

Names and link targets that are no UTF-8 are shown with U+FFFD in place of the odd bytes. Times that
no calendar has (a guest may set any) are shown as the nearest one that it has.
"""

from __future__ import annotations

import datetime
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
_FIRST = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)
_LAST = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`parts` is the path from the volume's root, () for the root; `target` is a symlink's."""

    parts: tuple[bytes, ...]
    status: os.stat_result
    target: bytes | None = None

    def json(self) -> dict[str, object]:
        """The entry as E2B's clients read it; `mode` is the permission bits."""
        status = self.status
        answer: dict[str, object] = {
            "name": _text(self.parts[-1]) if self.parts else "/",
            "type": _TYPES.get(stat.S_IFMT(status.st_mode), "unknown"),
            "path": shown_path(self.parts),
            "size": status.st_size,
            "mode": stat.S_IMODE(status.st_mode),
            "uid": status.st_uid,
            "gid": status.st_gid,
            "atime": rfc3339(status.st_atime_ns),
            "mtime": rfc3339(status.st_mtime_ns),
            "ctime": rfc3339(status.st_ctime_ns),
        }
        if self.target is not None:
            answer["target"] = _text(self.target)
        return answer


def look(directory: int, name: bytes, above: Sequence[bytes]) -> Entry:
    """The entry `name` of an open directory, which is at `above`; links are not followed.

    Raises OSError.
    """
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    target = None
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(name, dir_fd=directory)
    return Entry(parts=(*above, name), status=status, target=target)


def shown_path(parts: Sequence[bytes]) -> str:
    """The path as text, from the volume's root on."""
    return "/" + "/".join(_text(part) for part in parts)


def rfc3339(unix_ns: int) -> str:
    """A moment in UTC with microseconds and "Z"."""
    try:
        moment = _EPOCH + datetime.timedelta(microseconds=unix_ns // 1000)
    except OverflowError:
        moment = _LAST if unix_ns > 0 else _FIRST
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
