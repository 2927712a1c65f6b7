"""The zygote's loop: connections in, a child for each request, no thread ever.

A connection that says nothing is somebody who wants to learn of the zygote's end (noded, a zygote
in waiting). All reading is non-blocking; the children do what may take time, so that a burst of
starts waits for forks only. SIGCHLD is ignored, which has the kernel reap the children (wait(2));
their pidfds go on working, and it holds across the zygote's renewal.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import struct
import time
from contextlib import nullcontext

from vmcell_protos.errors import CallerError
from vmcell_protos.zygote import (
    ALIVE,
    FORK_VMM,
    HELLO,
    MAX_DATAGRAM_BYTES,
    REFUSED,
    RUN,
    Answer,
    MalformedMessage,
    Request,
    decode_request,
    encode_answer,
    encode_request,
    installation,
)
from vmcell_runtime.jail import EmptyRoot
from vmcell_runtime.size import Size, size_from_words, size_words
from vmcell_shim.caller import Caller, World
from vmcell_shim.installed_code import InstalledCode
from vmcell_shim.spares import Spares
from vmcell_shim.title import Title
from vmcell_shim.zygote_child import (
    Heritage,
    be_child,
    be_spare,
    hand_over,
    has_hung_up,
    let_go_on,
    say,
)
from vmcell_shim.zygote_stub import TAKEN_WITHIN_S

MAX_FORKS = 100
MAX_AGE_S = 600.0
# Why serve() returned.
STOP, RENEW, CHANGED = "stop", "renew", "changed"
_DESCRIPTORS = {RUN: 1, FORK_VMM: 2, HELLO: 0}
_MAX_SILENT = 64
_PAUSE_S = 0.2
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


class ZygoteLoop:
    """Serves `listener`, which stays the caller's. At most one in a process: it has the signals."""

    def __init__(
        self,
        listener: socket.socket,
        code: InstalledCode,
        title: Title,
        empty_root: EmptyRoot | None,
        spare_count: int,
        spare_sizes: list[Size],
    ) -> None:
        self._listener = listener
        self._code = code
        self._heritage = Heritage(World(), title, empty_root)
        self._installation = installation()
        self._silent: dict[int, tuple[socket.socket, int]] = {}
        self._forks = 0
        self._born = time.monotonic()
        self._settled = False
        self._ending = ""
        self._wake, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(listener, select.POLLIN)
        self._spares = Spares(self._fork_spare, self._poll, spare_count, spare_sizes)
        listener.setblocking(False)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end(STOP))
        signal.signal(signal.SIGHUP, lambda *_: self._end(RENEW))

    def serve(self) -> str:
        """Until there is a reason to end: STOP, RENEW or CHANGED. May be called again."""
        while not self._ending:
            self._turn()
            self._spares.fill()
            if self._forks >= MAX_FORKS or (self._forks and self._age_left_s() <= 0):
                self._end(RENEW)
        self._spares.drop()
        self._forks, self._born = 0, time.monotonic()
        why, self._ending = self._ending, ""
        return why

    @property
    def spare_sizes(self) -> list[Size]:
        """Of which a zygote that comes after this one shall keep spares."""
        return self._spares.sizes

    @property
    def is_stopping(self) -> bool:
        """Whether it has been told to end for good, also while serve() does not run."""
        return self._ending == STOP

    def stand_in(self, until: int) -> None:
        """In a fork of the zygote: serves until the other end of the pipe `until` is closed, then
        what has connected before that, and returns."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        self._ending = ""
        self._spares.keep_none()
        self._poll.register(until, select.POLLIN)
        while until not in self._turn():
            pass
        self._poll.unregister(until)
        self._poll.unregister(self._listener)
        deadline = time.monotonic() + TAKEN_WITHIN_S
        while time.monotonic() < deadline and not self._ending:
            self._turn(TAKEN_WITHIN_S)

    def _turn(self, at_most_s: float | None = None) -> list[int]:
        """Waits for something and handles it; the descriptors that were ready."""
        waits = [at_most_s, self._spares.wait_s()]
        if at_most_s is None and self._forks:
            waits.append(max(0.0, self._age_left_s()))
        wait_s = min((wait for wait in waits if wait is not None), default=None)
        wait_ms = None if wait_s is None else math.ceil(wait_s * 1000)
        ready = [fd for fd, _ in self._poll.poll(wait_ms)]
        for fd in ready:
            if fd == self._listener.fileno():
                self._accept()
            elif fd == self._wake:
                os.read(self._wake, 64)
            elif fd in self._silent:
                self._poll.unregister(fd)
                self._receive(*self._silent.pop(fd))
            elif fd in self._spares.descriptors:
                self._spares.hear(fd)
        return ready

    def _age_left_s(self) -> float:
        return self._born + MAX_AGE_S - time.monotonic()

    def _end(self, why: str) -> None:
        # What was asked for first is done; only the end of all goes before it.
        if not self._ending or why == STOP:
            self._ending = why

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # the other one of a zygote and its stand-in has it
        except OSError as error:
            # Out of descriptors or memory; those who wait go their direct way meanwhile.
            say(f"cannot take a connection yet: {error}")
            time.sleep(_PAUSE_S)
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _ = _PEER.unpack(credentials)
        if uid != os.geteuid():
            say(f"process {pid} of uid {uid} may not ask")
            connection.close()
            return
        self._receive(connection, pid)  # most have written before they are looked at

    def _wait_for(self, connection: socket.socket, caller: int) -> None:
        if len(self._silent) >= _MAX_SILENT:
            oldest = next(iter(self._silent))
            self._poll.unregister(oldest)
            self._silent.pop(oldest)[0].close()
        self._silent[connection.fileno()] = connection, caller
        self._poll.register(connection, select.POLLIN)

    def _receive(self, connection: socket.socket, caller: int) -> None:
        fds: list[int] = []
        silent = False
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            # CPython's recv_fds drops its flags, and would wait for ever.
            connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            datagram, fds, _, _ = socket.recv_fds(
                connection, MAX_DATAGRAM_BYTES + 1, max(_DESCRIPTORS.values()), flags
            )
            if datagram:
                self._answer(connection, decode_request(datagram), fds, caller)
        except BlockingIOError:
            silent = True
            self._wait_for(connection, caller)
        except MalformedMessage as error:
            _refuse(connection, str(error))
        except ConnectionResetError:
            return  # gone with something of ours unread; nothing is owed
        finally:
            for fd in fds:
                os.close(fd)
            if not silent:
                connection.close()

    def _answer(
        self, connection: socket.socket, request: Request, fds: list[int], caller: int
    ) -> None:
        if len(fds) != _DESCRIPTORS[request.kind]:
            _refuse(connection, f"{len(fds)} descriptors came along")
        elif request.kind == HELLO:
            _tell(connection, Answer(ALIVE, number=os.getpid(), output=self._installation))
        elif request.installation != self._installation:
            _refuse(connection, "the zygote is of another installation of vmcell")
        elif not has_hung_up(connection):
            # It begins while the zygote looks, which takes as long, and waits for its word.
            spare = self._hand_over(connection, request, fds, caller)
            with spare or nullcontext():
                self._serve(connection, request, fds, caller, spare)
            self._spares.busy()

    def _serve(
        self,
        connection: socket.socket,
        request: Request,
        fds: list[int],
        caller: int,
        spare: socket.socket | None,
    ) -> None:
        """By the spare that has it already, or by a child."""
        if self._code.has_changed(for_vmm=request.kind == FORK_VMM):
            _refuse(connection, "another version of vmcell has been installed")
            self._end(CHANGED)
        elif spare is None or not let_go_on(spare):
            self._settle(caller)
            self._fork(connection, request, fds, caller)

    def _hand_over(
        self, connection: socket.socket, request: Request, fds: list[int], caller: int
    ) -> socket.socket | None:
        """The socket of the spare that has it now, the caller's; None where there is none."""
        if request.kind != FORK_VMM or not request.argv:
            return None
        try:
            spare = self._spares.take(size_from_words(request.argv))
        except CallerError as error:
            say(f"process {caller} wants a VMM for no machine: {error}")
            return None
        if spare is None:
            return None
        self._poll.unregister(spare)
        if not hand_over(spare, connection, fds, caller):
            spare.close()
            return None
        self._forks += 1
        return spare

    def _fork_spare(self, size: Size, control: socket.socket) -> bool:
        """For `Spares`: False when it fails."""
        try:
            pid = os.fork()
        except OSError as error:
            say(f"cannot fork a spare: {error.strerror}")
            return False
        if pid == 0:
            self._forget()
            be_spare(self._heritage, control, size)
        self._touch(size)
        return True

    def _touch(self, size: Size) -> None:
        """What a request touches, whose pages the fork has made shared again: they are copied now
        and not while somebody waits."""
        request = Request(FORK_VMM, self._installation, argv=size_words(size))
        size_from_words(decode_request(encode_request(request)).argv)
        self._code.has_changed(for_vmm=True)  # seen when it counts

    def _fork(
        self, connection: socket.socket, request: Request, fds: list[int], caller: int
    ) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            _refuse(connection, f"fork failed: {error.strerror}")
            return
        if pid == 0:
            self._forget()
            be_child(self._heritage, connection, request, fds, caller)
        self._forks += 1

    def _forget(self) -> None:
        """In a child: these objects live on; their descriptors are somebody else's soon."""
        for other, _ in self._silent.values():
            other.detach()
        self._listener.detach()
        self._spares.forget()

    def _settle(self, caller: int) -> None:
        """Into the cgroup of the first caller, which is containerd's: children are born there.

        To move each child would cost 5 to 15 ms, a grace period of the kernel's RCU (measured).
        """
        if self._settled:
            return
        self._settled = True
        try:
            self._heritage.world.join_cgroup(Caller(caller))
        except OSError as error:
            say(f"stays in its own cgroup, which makes starts slower: {error}")


def _refuse(connection: socket.socket, reason: str) -> None:
    say(f"refused a request: {reason}")
    _tell(connection, Answer(REFUSED, errors=reason.encode(errors="replace")))


def _tell(connection: socket.socket, answer: Answer) -> None:
    try:
        connection.send(encode_answer(answer), socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        return  # gone meanwhile; it has helped itself
