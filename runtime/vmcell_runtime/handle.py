"""The host's side of a VMM: start the process, talk to it, learn how it ended.

A thread reads what the VMM says, so any thread of the caller may use a handle. That the process is
gone is learned from its socket and its pidfd, never by asking a number that may be someone else's.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import NamedTuple

from vmcell_protos import errors
from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime import memory
from vmcell_runtime.config import MachineConfig
from vmcell_runtime.control import (
    MAX_MESSAGE_BYTES,
    Answer,
    Answered,
    BalloonSize,
    Boot,
    ConnectVsock,
    Event,
    Exited,
    Failed,
    GetBalloon,
    ListenVsock,
    Pause,
    Plain,
    PlugBlk,
    PlugPmem,
    Request,
    Restore,
    Resume,
    Running,
    Save,
    Saved,
    SetBalloon,
    Unplug,
    decode_event,
    encode,
    error_of,
)
from vmcell_runtime.kvm.host_kind import open_kvm, require_linux_host
from vmcell_runtime.size import Size, size_of
from vmcell_runtime.vmm_uid import DEFAULT_RANGE, UidRange, lease_uid
from vmcell_runtime.zygote_client import ask_for_vmm

START_TIMEOUT_S = 60.0  # also where the dev VM's software CPU runs the interpreter
CONNECT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 30.0  # of the VMM itself: it answers in milliseconds on any real machine
SAVE_TIMEOUT_S = 300.0  # a slow disk and many GiB
CLOSE_TIMEOUT_S = 5.0
_SHIM_FD = 3  # in the child

_BOOTSTRAP = "import sys; sys.path[:0] = {roots!r}; from vmcell_runtime.vmm import main; main({fd})"


class BalloonState(NamedTuple):
    """What a guest was asked to give back, and what it says it has given, in MiB."""

    wanted_mib: int
    actual_mib: int


class VmmExit(NamedTuple):
    """How a VMM ended: one of `control.END_REASONS`, and a sentence or an empty string."""

    reason: str
    detail: str


def spawn(
    config: MachineConfig,
    descriptors: Sequence[int],
    *,
    log_fd: int,
    saved: SavedFiles | None = None,
    uids: UidRange = DEFAULT_RANGE,
) -> VmmHandle:
    """A VMM whose guest, a Linux, has started, or with `saved` stands still as it was saved.

    `descriptors` are those `config` names by index; they stay the caller's and may be closed when
    this returns. The VMM writes its log to `log_fd`, and is one of `uids` if this process is root.
    Raises HostError where /dev/kvm cannot run Linux, else whichever of the three errors kept the
    machine from starting; nothing is left then.
    """
    require_linux_host()
    return launch(config, descriptors, log_fd=log_fd, saved=saved, uids=uids)


class SavedFiles(NamedTuple):
    """Descriptors of a saved machine's memory and state, open for reading; their opener's."""

    memory_fd: int
    state_fd: int


def launch(
    config: MachineConfig,
    descriptors: Sequence[int],
    *,
    log_fd: int,
    saved: SavedFiles | None = None,
    uids: UidRange = DEFAULT_RANGE,
) -> VmmHandle:
    """`spawn` for a kernel that is known to run on any /dev/kvm; it does not look at the host.

    With `saved` the guest goes on where it was saved once `resume` is called; `config` is as of its
    boot, with devices of its own.
    """
    config.check_descriptors(len(descriptors))
    size = size_of(config, descriptors)
    with ExitStack() as opened:
        with _Asking(log_fd, size) as asking:
            # While the zygote does its part.
            config, vhost_fds = _open_vhost(config, len(descriptors), opened)
            order = _Order(config, [*descriptors, *vhost_fds], saved, uids, opened)
            handle = asking.handle(order)
        if handle is None:
            handle = _execute_process(log_fd)
        try:
            handle.start(order)
        except BaseException:
            handle.close()
            raise
        return handle


def _open_vhost(
    config: MachineConfig, count: int, opened: ExitStack
) -> tuple[MachineConfig, list[int]]:
    """A /dev/vhost-net for each interface that wants one, where the host has it."""
    nets = list(config.net)
    fds: list[int] = []
    for number, net in enumerate(nets):
        if not net.in_kernel or net.vhost_descriptor is not None:
            continue
        try:
            fd = os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            break  # the user-space path gives the guest the same view
        opened.callback(os.close, fd)
        nets[number] = replace(net, vhost_descriptor=count + len(fds))
        fds.append(fd)
    return replace(config, net=tuple(nets)), fds


class _Order:
    """What a VMM is asked first, and the descriptors that go with it, which are `opened`'s until
    they are taken."""

    def __init__(
        self,
        config: MachineConfig,
        fds: Sequence[int],
        saved: SavedFiles | None,
        uids: UidRange,
        opened: ExitStack,
    ) -> None:
        last = [open_kvm()]
        opened.callback(os.close, last[0])
        uid = 0
        if os.geteuid() == 0:
            uid, held = lease_uid(uids)
            opened.callback(os.close, held)  # the VMM's copy keeps the uid
            last.append(held)
        self._listening: dict[int, socket.socket] = {}
        opened.callback(self._close)
        theirs = []
        for port in config.vsock.listen_ports if config.vsock is not None else ():
            self._listening[port], other = socket.socketpair()
            theirs.append(opened.enter_context(other))
        # Sent before the process has answered: it may be given up yet, but a machine that stands
        # still until it is told to go on does no harm then.
        self.goes_ahead = saved is not None
        self.is_sent = False
        message = Restore if saved else Boot
        self.datagram = encode(message(config=config, uid=uid))
        self.fds = [*fds, *(sock.fileno() for sock in theirs), *(saved or ()), *last]

    def send_ahead(self, sock: socket.socket) -> bool:
        """False if the socket does not take it."""
        try:
            socket.send_fds(sock, [self.datagram], self.fds, socket.MSG_DONTWAIT)
        except OSError:
            return False
        self.is_sent = True
        return True

    def take_listening(self) -> dict[int, socket.socket]:
        """Our ends of the sockets for the guest's ports, now the taker's."""
        taken, self._listening = self._listening, {}
        return taken

    def _close(self) -> None:
        for sock in self._listening.values():
            sock.close()


class _Asking:
    """The zygote is asked for a VMM; a context manager, and what it leaves is given up."""

    def __init__(self, log_fd: int, size: Size) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._asked = ask_for_vmm(theirs.fileno(), log_fd, size)

    def handle(self, order: _Order) -> VmmHandle | None:
        """Of the process that was forked; None if the zygote does not do it."""
        if self._asked is None or (order.goes_ahead and not order.send_ahead(self._ours)):
            return None
        forked = self._asked.forked()
        if forked is None:
            order.is_sent = False
            return None
        return VmmHandle(*forked, socket.socket(fileno=self._ours.detach()))

    def __enter__(self) -> _Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        if self._asked is not None:
            self._asked.close()


def _execute_process(log_fd: int) -> VmmHandle:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    roots = [_source_root(module.__file__ or "") for module in (errors, memory)]
    bootstrap = _BOOTSTRAP.format(roots=roots, fd=_SHIM_FD)
    # -I -S: no site, no environment, no current directory; only these roots and the stdlib.
    # -B: it writes nothing beside the source; `vmcell setup` has compiled it.
    arguments = [sys.executable, "-I", "-S", "-B", "-c", bootstrap, "vmcell-vmm"]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log_fd, 1),
        (os.POSIX_SPAWN_DUP2, log_fd, 2),
        (os.POSIX_SPAWN_DUP2, theirs.fileno(), _SHIM_FD),
    ]
    try:
        pid = os.posix_spawn(
            sys.executable, arguments, {"LANG": "C.UTF-8"}, file_actions=actions, setsid=True
        )
    except OSError as error:
        ours.close()
        raise HostError(f"starting the VMM process failed: {error.strerror}") from error
    finally:
        theirs.close()
    return VmmHandle(pid, os.pidfd_open(pid), ours)


def _source_root(module_file: str) -> str:
    """Two up from a module of a top-level package: what sys.path must hold to import it."""
    return os.path.dirname(os.path.dirname(os.path.abspath(module_file)))


class VmmHandle:
    """One VMM process, a child or the zygote's. Owns it, its pidfd and its socket; `close` is
    idempotent."""

    def __init__(self, pid: int, pidfd: int, sock: socket.socket) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._sock = sock
        self._changed = threading.Condition()
        self._listening: dict[int, socket.socket] = {}
        self._answers: dict[int, Answer] = {}
        self._waiting: set[int] = set()
        self._next_request_id = 1
        self._running = False
        self._failed: Failed | None = None
        self._said: VmmExit | None = None
        self._exit: VmmExit | None = None
        self._closed = False
        self._reader = threading.Thread(target=self._read, name=f"vmm-{pid}", daemon=True)
        self._reader.start()

    def start(self, order: _Order) -> None:
        """Sends the order, unless that is done, and waits until the machine is there; for `launch`
        only."""
        self._listening = order.take_listening()
        if not order.is_sent:
            self._send_datagram(order.datagram, order.fds)
        self._wait_started()

    def connect_vsock(self, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """A stream to `port` of the guest, the caller's to close.

        GuestError if nothing listens there, HostError if the guest does not answer or is gone.
        """
        ours, theirs = socket.socketpair()
        try:
            request = ConnectVsock(request_id=self._new_request_id(), port=port)
            with theirs:
                self._ask(request, [theirs.fileno()], timeout_s)
        except BaseException:
            ours.close()
            raise
        return ours

    def accept_vsock(self, port: int) -> socket.socket:
        """The host's end of the guest's next connection to host port `port`; the caller's to close.

        Comes at once: what is written waits for the guest, and reading waits for it. The guest
        finds the port open from its first instruction if `config.vsock.listen_ports` has it.
        """
        with self._changed:
            prepared = self._listening.pop(port, None)
        if prepared is not None:
            return prepared
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._send(ListenVsock(port=port), [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        return ours

    def plug_pmem(self, window: int, fd: int) -> None:
        """Puts a read-only image into a window of `config.spare_window_numbers`.

        `fd` is a regular file padded to a multiple of 2 MiB; it stays the caller's, as for all
        descriptors here, and may be closed afterwards. The guest has the device when the agent has
        bound `virtio-mmio.<window>`. CallerError if the window is no spare one or not empty.
        """
        self._ask(PlugPmem(request_id=self._new_request_id(), window=window), [fd])

    def plug_blk(self, window: int, fd: int, read_only: bool = False) -> None:
        """Puts a disk into a spare window; `fd` is open O_RDONLY if `read_only`, else O_RDWR."""
        request_id = self._new_request_id()
        self._ask(PlugBlk(request_id=request_id, window=window, read_only=read_only), [fd])

    def unplug(self, window: int) -> None:
        """Empties a spare window; afterwards the VMM holds nothing of what was in it.

        It does not wait for the guest: one whose driver has not been unbound before finds its
        device gone. CallerError (not_found) if the window is empty already.
        """
        self._ask(Unplug(request_id=self._new_request_id(), window=window))

    def pause(self) -> None:
        """Returns when every vCPU stands still; the guest's clock stands too. Idempotent.

        The VMM goes on: it answers, completes the guest's requests, and can be killed.
        """
        self._ask(Pause(request_id=self._new_request_id()))

    def resume(self) -> None:
        """Returns when the vCPUs go on; the guest's wall clock is late until it is set. Idempotent.

        Wishes of several threads are granted one after the other.
        """
        self._ask(Resume(request_id=self._new_request_id()))

    def save(self, memory_fd: int, state_fd: int) -> int:
        """Writes the paused machine to two files; how many bytes of memory had to be written.

        `memory_fd` is open O_RDWR on a copy of what the guest's memory was restored from or last
        saved to, or on a hole of the RAM's length; nobody may write to that file afterwards, for
        the guest has it as its memory from then on. `state_fd` is open for writing on an empty
        file. CallerError (failed_precondition) if the machine runs or cannot be saved, HostError
        (resource_exhausted) if a disk is full; the guest can go on then.
        """
        request = Save(request_id=self._new_request_id())
        answer = self._ask(request, [memory_fd, state_fd], SAVE_TIMEOUT_S)
        if not isinstance(answer, Saved):
            raise HostError(f"VMM {self.pid} did not save; is it one of this version?")
        return answer.memory_bytes

    def set_balloon(self, mib: int) -> None:
        """Asks the guest to give `mib` of its memory back to the host, or 0 to have it all again.

        Returns at once; `balloon` says how far it has come. CallerError if the machine has no
        balloon or if less than 64 MiB would be left.
        """
        self._ask(SetBalloon(request_id=self._new_request_id(), mib=mib))

    def balloon(self) -> BalloonState:
        """What the guest was asked to give back, and what it says it has."""
        answer = self._ask(GetBalloon(request_id=self._new_request_id()))
        if not isinstance(answer, BalloonSize):
            raise HostError(f"VMM {self.pid} gave no balloon size; is it one of this version?")
        return BalloonState(answer.wanted_mib, answer.actual_mib)

    def wait_exit(self, timeout_s: float | None = None) -> VmmExit:
        """How the VMM ended, once its process is gone; TimeoutError if that takes longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._exit is not None, timeout_s)
            if self._exit is None:
                raise TimeoutError(f"VMM {self.pid} did not end within {timeout_s} s")
            return self._exit

    def kill(self) -> None:
        """Ends the VMM now (SIGKILL); `wait_exit` then says killed. No error if it has ended."""
        with self._changed, suppress(ProcessLookupError):
            # Under the lock: `close` must not free the descriptor's number in between.
            if not self._closed:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Ends the VMM if it still runs, waits for it and gives everything back."""
        with suppress(OSError):  # the VMM may have been first, or `close` has been here
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        with self._changed:
            if self._closed:
                return
            self._closed = True
        os.close(self._pidfd)
        self._sock.close()
        for sock in self._listening.values():
            sock.close()
        self._listening.clear()

    # The reader's thread

    def _read(self) -> None:
        while True:
            try:
                datagram = self._sock.recv(MAX_MESSAGE_BYTES + 1)
            except ConnectionResetError:
                break
            if not datagram:
                break
            try:
                event = decode_event(datagram)
            except CallerError:
                # A VMM that talks nonsense is broken or taken over.
                self.kill()
                break
            self._note(event)
        status = self._reap()
        with self._changed:
            self._exit = self._said or status
            self._changed.notify_all()

    def _note(self, event: Event) -> None:
        with self._changed:
            match event:
                case Running():
                    self._running = True
                case Failed():
                    self._failed = event
                case Exited():
                    self._said = VmmExit(event.reason, event.detail)
                case Answered() | BalloonSize() | Saved():
                    # An answer nobody waits for any more is dropped.
                    if event.request_id in self._waiting:
                        self._waiting.discard(event.request_id)
                        self._answers[event.request_id] = event
            self._changed.notify_all()

    def _reap(self) -> VmmExit:
        """Waits for the process; what its wait status alone says.

        Its socket has ended, so it has nothing more to do: one that stays is ended.
        """
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(CLOSE_TIMEOUT_S * 1000):
            self.kill()
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            # The zygote's child, or somebody else's.
            return VmmExit("killed", "it ended without a word to the shim; vmm.log may say why")
        if info is None:
            raise AssertionError("unreachable: waitid without WNOHANG")
        if info.si_code == os.CLD_EXITED:
            said = "without a word to the shim; vmm.log says why"
            return VmmExit("vmm_error", f"it ended with exit code {info.si_status}, {said}")
        return VmmExit("killed", f"signal {info.si_status} ended the VMM")

    # The callers' threads

    def _send(self, request: Request, fds: Sequence[int]) -> None:
        self._send_datagram(encode(request), fds)

    def _send_datagram(self, datagram: bytes, fds: Sequence[int]) -> None:
        try:
            socket.send_fds(self._sock, [datagram], list(fds), socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise HostError(f"VMM {self.pid} takes no more messages; is it stuck?") from error
        except OSError as error:
            raise self._gone(f"could not be asked ({error.strerror})") from error

    def _wait_started(self) -> None:
        with self._changed:
            over = self._changed.wait_for(
                lambda: self._running or self._failed or self._exit, START_TIMEOUT_S
            )
            if self._failed is not None:
                raise error_of(self._failed)
            if not over:
                raise HostError(f"VMM {self.pid} did not start within {START_TIMEOUT_S} s")
            if not self._running:
                raise self._gone("did not start")

    def _new_request_id(self) -> int:
        with self._changed:
            self._next_request_id += 1
            return self._next_request_id

    def _ask(
        self,
        request: ConnectVsock | Plain,
        fds: Sequence[int] = (),
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Answer:
        """Sends and waits; raises the error that the answer carries, or that there is none."""
        with self._changed:
            self._waiting.add(request.request_id)
        try:
            self._send(request, fds)
            answer = self._wait_answer(request, timeout_s)
        finally:
            with self._changed:
                self._waiting.discard(request.request_id)
        if isinstance(answer, Answered) and answer.error:
            raise error_of(answer)
        return answer

    def _wait_answer(self, request: ConnectVsock | Plain, timeout_s: float) -> Answer:
        wanted = request.request_id
        with self._changed:
            self._changed.wait_for(
                lambda: wanted in self._answers or self._exit is not None, timeout_s
            )
            answer = self._answers.pop(wanted, None)
            if answer is None and self._exit is not None:
                raise self._gone(f"was asked to {_words(request)}")
        if answer is None:
            raise HostError(
                f"VMM {self.pid} did not {_words(request)} within {timeout_s} s",
                code="deadline_exceeded",
            )
        return answer

    def _gone(self, what: str) -> HostError:
        said = self._exit or self._said
        ending = f" and ended: {said.reason}: {said.detail}" if said else ""
        return HostError(f"VMM {self.pid} {what}{ending}")


def _words(request: ConnectVsock | Plain) -> str:
    """What a request asks for, for a sentence."""
    where = request.kind.replace("_", " ")
    match request:
        case ConnectVsock(port=port):
            return f"{where} port {port}"
        case PlugPmem(window=window) | PlugBlk(window=window) | Unplug(window=window):
            return f"{where} window {window}"
    return where
