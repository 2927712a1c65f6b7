"""Acting with a user's rights: system calls on files between `with acting_as(account):` lines.

envd has one thread, so the effective ids of the process are those of the one request being worked
on. Real and saved ids stay 0, so the user's own processes can neither signal nor trace envd.
"""

from __future__ import annotations

import os
from types import TracebackType

from .accounts import Account


class acting_as:
    """Context manager: effective uid, gid and groups of `account` inside, envd's own after.

    For uid 0 nothing changes. Not reentrant; `os.fork` and waiting do not belong inside.
    """

    __slots__ = ("_account", "_own_groups")

    def __init__(self, account: Account) -> None:
        self._account = account
        self._own_groups: list[int] = []

    def __enter__(self) -> None:
        if self._account.uid == 0:
            return
        self._own_groups = os.getgroups()
        try:
            os.setgroups(self._account.groups)
            os.setegid(self._account.gid)
            os.seteuid(self._account.uid)
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._account.uid != 0:
            self._restore()

    def _restore(self) -> None:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(self._own_groups)
