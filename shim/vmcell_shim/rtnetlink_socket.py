"""A socket to the kernel's routing tables; it belongs to the namespace it was opened in.

So it may be opened in one thread, inside a namespace, and used in another, outside.
"""

from __future__ import annotations

import os
import socket
import sys

from vmcell_protos import rtnetlink as nl
from vmcell_protos import rtnetlink_rows
from vmcell_protos.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

_SO_NETNS_COOKIE = 71
# The kernel's dumps come in pieces of at most 32 KiB (net/netlink/af_netlink.c).
_ANSWER_BYTES = 64 << 10
_ANSWER_S = 5.0
_DUMP_TRIES = 10


class RtnetlinkSocket:
    """One request at a time. The caller closes it; an open one keeps its namespace alive."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
            for option in (nl.NETLINK_CAP_ACK, nl.NETLINK_EXT_ACK):
                self._socket.setsockopt(nl.SOL_NETLINK, option, 1)
        except OSError as error:
            raise HostError(f"cannot open a routing socket: {error}") from error
        self._socket.settimeout(_ANSWER_S)

    def __enter__(self) -> RtnetlinkSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def namespace_cookie(self) -> int:
        """The number of this socket's namespace, never given to another one until the next boot;
        0 where the kernel has no such number (before 5.14)."""
        try:
            cookie = self._socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError:
            return 0
        return int.from_bytes(cookie, sys.byteorder)

    def request(self, message: bytes, what: str, *, tolerated: Collection[int] = ()) -> int:
        """The errno of one change: 0, or one of `tolerated`; HostError "cannot <what>: ..." for
        another."""
        try:
            self._socket.send(message)
            answer = self._socket.recv(_ANSWER_BYTES)
            number, text = nl.error_number(answer), nl.error_text(answer)
        except (OSError, ValueError) as error:
            raise HostError(f"cannot {what}: {error}") from error
        if number and number not in tolerated:
            reason = f"{os.strerror(number)} ({text})" if text else os.strerror(number)
            raise HostError(f"cannot {what}: {reason}")
        return number

    def dump(self, kind: int) -> list[bytes]:
        """The bodies of one RTM_GET* dump, taken while nothing changed. Raises HostError."""
        try:
            for _ in range(_DUMP_TRIES):
                bodies = self._dump_once(kind)
                if bodies is not None:
                    return bodies
        except (OSError, ValueError) as error:
            raise HostError(f"cannot read the interfaces of a namespace: {error}") from error
        raise HostError(
            f"the interfaces of a namespace changed {_DUMP_TRIES} times while they were read"
        )

    def _dump_once(self, kind: int) -> list[bytes] | None:
        """None when the tables changed meanwhile (NLM_F_DUMP_INTR)."""
        self._socket.send(rtnetlink_rows.dump(kind))
        bodies: list[bytes] = []
        interrupted = False
        while True:
            for answer, flags, body in nl.messages(self._socket.recv(_ANSWER_BYTES)):
                interrupted |= bool(flags & nl.NLM_F_DUMP_INTR)
                if answer == nl.NLMSG_DONE:
                    return None if interrupted else bodies
                if answer == nl.NLMSG_ERROR:
                    number = -int(nl.I32.unpack_from(body)[0])
                    raise OSError(number, os.strerror(number))
                bodies.append(body)
