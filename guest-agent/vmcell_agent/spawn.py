"""The agent's side of a fork: pipes, namespaces of the child-to-be, the report channel.

A pid namespace is entered by children only, so the agent points its "pid namespace for children"
at the container's for the time of one fork and back again (pid_namespaces(7)); the child stays the
agent's own child and its exit is reaped like any other. The agent is single-threaded, so forking
without exec is safe.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from vmcell_agent import abi, child, report, syscalls
from vmcell_agent.attempt import attempt
from vmcell_agent.child import InitLaunch, Launch, Stdio
from vmcell_agent.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vmcell_agent.cgroup import Cgroup
    from vmcell_agent.ociprocess import ProcessSpec
    from vmcell_protos.agent import Streams


class Child(Record):
    """A forked child and the agent's ends; the receiver owns the descriptors. -1: no such pipe."""

    pid: int
    channel: socket.socket
    stdin: int
    stdout: int
    stderr: int


class Window(Record):
    """Size of a terminal in characters; 0: not said."""

    rows: int
    columns: int


class _Pipes:
    """The three standard streams: pipe where a stream was declared, else /dev/null."""

    def __init__(self, streams: Streams, stack: ExitStack) -> None:
        """Children's ends are closed by `stack`, the agent's by `close_ours` or their owner."""
        self.ours = [-1, -1, -1]  # stdin, stdout, stderr; -1: none
        self.theirs = [-1, -1, -1]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        declared = (streams.stdin, streams.stdout, streams.stderr)
        for index in range(3):
            if streams.terminal or not declared[index]:
                self.theirs[index] = null
                continue
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            ours, theirs = (write_end, read_end) if index == 0 else (read_end, write_end)
            os.set_blocking(ours, False)
            self.ours[index], self.theirs[index] = ours, theirs
            stack.callback(os.close, theirs)

    def close_ours(self) -> None:
        for fd in self.ours:
            if fd >= 0:
                os.close(fd)
        self.ours = [-1, -1, -1]


class Spawner:
    """Forks children into pid namespaces; one for the agent. `close` is idempotent."""

    def __init__(self) -> None:
        self._own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._own_pid_namespace >= 0:
            os.close(self._own_pid_namespace)
            self._own_pid_namespace = -1

    def fork_into_new_pid_namespace(self, become: Callable[[], NoReturn]) -> int:
        """The pid (in the agent's namespace) of a child that is pid 1 of a new one."""
        with attempt("fork the first process of a pid namespace"):
            syscalls.unshare(abi.CLONE_NEWPID)
            try:
                pid = os.fork()
                if pid == 0:
                    become()
            finally:
                syscalls.setns(self._own_pid_namespace, abi.CLONE_NEWPID)
        return pid

    def spawn(
        self,
        process: ProcessSpec,
        streams: Streams,
        window: Window,
        cgroup: Cgroup,
        place: InitLaunch | int,
    ) -> Child:
        """Fork a container's init (`place` says what) or a process beside the init whose pid
        `place` is; raises HostError and leaves nothing when the fork fails."""
        with ExitStack() as stack:
            with attempt("prepare a process"):
                pipes = _Pipes(streams, stack)
                stack.callback(pipes.close_ours)
                ours, theirs = report.make_pair()
                stack.callback(theirs.close)
                stack.callback(ours.close)
                procs = cgroup.open_procs()
                stack.callback(os.close, procs)
                init_pidfd = -1
                if isinstance(place, int):
                    init_pidfd = os.pidfd_open(place)
                    stack.callback(os.close, init_pidfd)
            stdio = Stdio(
                stdin=pipes.theirs[0],
                stdout=pipes.theirs[1],
                stderr=pipes.theirs[2],
                terminal=streams.terminal,
                rows=window.rows,
                columns=window.columns,
            )
            launch = Launch(process, stdio, theirs, procs)
            pid = self._fork(launch, place, init_pidfd)
            # From here on the agent's ends belong to the caller.
            channel = socket.socket(ours.family, ours.type, ours.proto, ours.detach())
            child_ = Child(pid, channel, *pipes.ours)
            pipes.ours = [-1, -1, -1]
            return child_

    def _fork(self, launch: Launch, place: InitLaunch | int, init_pidfd: int) -> int:
        with attempt("fork a process into the container", code="failed_precondition"):
            if isinstance(place, int):  # ESRCH, and ENOMEM at the fork: its init is just ending
                syscalls.setns(init_pidfd, abi.CLONE_NEWPID)
            elif place.pid_namespace >= 0:
                syscalls.setns(place.pid_namespace, abi.CLONE_NEWPID)
            else:
                syscalls.unshare(abi.CLONE_NEWPID)
            try:
                pid = os.fork()
                if pid == 0:
                    if isinstance(place, int):
                        child.run_added(launch, init_pidfd)
                    child.run_init(launch, place)
            finally:
                syscalls.setns(self._own_pid_namespace, abi.CLONE_NEWPID)
        return pid
