"""The process that a pod's pid namespace hangs on: its pid 1, which does nothing.

A forked child that has given up what it was: an empty read-only root, no capability, no descriptor,
not to be looked into. The kernel reaps the namespace's orphans for it (SIGCHLD is ignored), and its
end is the end of everything in the namespace (pid_namespaces(7)).
"""

from __future__ import annotations

import os
import select
import signal
import socket

from vmcell_agent import abi, capabilities, forked, report, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from vmcell_agent.reaper import Reaper
    from vmcell_agent.spawn import Spawner

NAME = "pause"  # what Kubernetes' users know it as
READY_SECONDS = 2.0
_ROOT_OPTIONS = "size=4k,nr_inodes=2,mode=555"


class PidHolder:
    """Forked by the constructor; `pidfd` is for setns(2). `close` ends it and is idempotent."""

    def __init__(self, spawner: Spawner, reaper: Reaper, directory: str) -> None:
        """`directory` is any directory, used as a mount point in a mount namespace of its own."""
        self._ours, theirs = report.make_pair()
        try:
            self._pid = spawner.fork_into_new_pid_namespace(lambda: _hold(theirs, directory))
        except BaseException:
            self._ours.close()
            raise
        finally:
            theirs.close()
        reaper.expect(self._pid, self._reaped)
        self.pidfd = -1
        try:
            with attempt("open the holder of the pod's pid namespace"):
                self.pidfd = os.pidfd_open(self._pid)
        except HostError:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._pid != 0

    def wait_until_ready(self) -> None:
        """Returns once it has left the guest's file system, a millisecond after the fork; raises
        HostError. Only the first call can wait."""
        if self._ours.fileno() < 0:
            return
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        try:
            if not poll.poll(READY_SECONDS * 1000):
                raise HostError(
                    f"the pod's pid namespace is not there after {READY_SECONDS:.0f} s",
                    code="deadline_exceeded",
                )
            said = report.receive(self._ours)
            if said.kind != "R":
                raise said.error or HostError("the pod's pid namespace ended", code="internal")
        except HostError:
            self.close()
            raise
        finally:
            self._ours.close()

    def _reaped(self, wait_status: int) -> None:
        self._pid = 0

    def close(self) -> None:
        self._ours.close()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _hold(channel: socket.socket, directory: str) -> NoReturn:
    with report.last_words(channel):
        forked.reset()
        forked.close_all_but(0, 1, 2, channel.fileno())
        syscalls.prctl(abi.PR_SET_DUMPABLE, 0)
        syscalls.set_process_name(NAME)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with attempt("leave the guest's file system"):
            _enter_empty_root(directory)
        with attempt("drop all capabilities"):
            capabilities.drop_bounding(0)
            capabilities.apply(capabilities.CapabilitySets())
        report.send_ready(channel)
        os.closerange(0, channel.fileno() + 1)
        while True:
            signal.pause()
    os._exit(report.EXIT_NOT_STARTED)


def _enter_empty_root(directory: str) -> None:
    syscalls.unshare(abi.CLONE_NEWNS)
    syscalls.mount("", "/", "", abi.MS_REC | abi.MS_PRIVATE)
    syscalls.mount("tmpfs", directory, "tmpfs", abi.MS_RDONLY, _ROOT_OPTIONS)
    os.chdir(directory)
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", abi.MNT_DETACH)
    os.chdir("/")
