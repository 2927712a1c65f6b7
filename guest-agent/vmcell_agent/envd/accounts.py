"""Users and groups of the container: its own /etc/passwd and /etc/group (passwd(5), group(5)).

The C library's lookups are not used: their modules (nss) would be loaded from the container.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

_MAX_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Account:
    """One line of /etc/passwd with the supplementary groups of /etc/group, gid included."""

    name: str
    uid: int
    gid: int
    home: str
    groups: tuple[int, ...]


_BUILT_IN_ROOT = Account(name="root", uid=0, gid=0, home="/root", groups=(0,))


# The last 32-bit number means "leave it" to chown(2) and setresuid(2).
_MAX_ID = 0xFFFF_FFFE


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) <= _MAX_ID else None


def parse_passwd(text: str, members: dict[str, list[int]]) -> dict[str, Account]:
    """Accounts by name; the first line of a name counts, lines that are no account are passed."""
    accounts: dict[str, Account] = {}
    for line in text.splitlines():
        parts = line.split(":")
        if len(parts) < 6 or not parts[0]:
            continue
        uid, gid = _number(parts[2]), _number(parts[3])
        if uid is None or gid is None or parts[0] in accounts:
            continue
        groups = tuple(dict.fromkeys([gid, *members.get(parts[0], [])]))
        accounts[parts[0]] = Account(
            name=parts[0], uid=uid, gid=gid, home=parts[5] or "/", groups=groups
        )
    return accounts


def parse_group(text: str) -> tuple[dict[int, str], dict[str, list[int]]]:
    """Group names by gid, and the gids each user is a member of."""
    names: dict[int, str] = {}
    members: dict[str, list[int]] = {}
    for line in text.splitlines():
        parts = line.split(":")
        gid = _number(parts[2]) if len(parts) >= 4 else None
        if gid is None:
            continue
        names.setdefault(gid, parts[0])
        for user in filter(None, parts[3].split(",")):
            members.setdefault(user.strip(), []).append(gid)
    return names, members


def _read_text(path: str) -> tuple[str, tuple[int, ...]]:
    """The file's text and what tells its versions apart; empty when it is no readable file."""
    try:
        # A fifo in its place must not stop the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return "", ()
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "", ()
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        pieces = []
        left = _MAX_BYTES
        while left and (piece := os.read(descriptor, min(left, 65536))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces).decode("utf-8", "surrogateescape"), version
    finally:
        os.close(descriptor)


def _version(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Accounts:
    """The two files, read again whenever one of them has changed."""

    def __init__(self, passwd: str = "/etc/passwd", group: str = "/etc/group") -> None:
        self._paths = (passwd, group)
        self._versions: tuple[tuple[int, ...], ...] | None = None
        self._by_name: dict[str, Account] = {}
        self._user_names: dict[int, str] = {}
        self._group_names: dict[int, str] = {}

    def _refresh(self) -> None:
        versions = tuple(_version(path) for path in self._paths)
        if versions == self._versions:
            return
        passwd, passwd_version = _read_text(self._paths[0])
        group, group_version = _read_text(self._paths[1])
        self._group_names, members = parse_group(group)
        self._by_name = parse_passwd(passwd, members)
        self._by_name.setdefault("root", _BUILT_IN_ROOT)
        self._user_names = {}
        for account in self._by_name.values():
            self._user_names.setdefault(account.uid, account.name)
        self._versions = (passwd_version, group_version)

    def find(self, name: str) -> Account | None:
        self._refresh()
        return self._by_name.get(name)

    def user_name(self, uid: int) -> str:
        """The name of `uid`, else its number as text."""
        self._refresh()
        return self._user_names.get(uid, str(uid))

    def group_name(self, gid: int) -> str:
        self._refresh()
        return self._group_names.get(gid, str(gid))
