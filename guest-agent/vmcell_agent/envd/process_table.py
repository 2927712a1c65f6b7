"""All processes started over the API, and the reaping of everything else that ends here."""

from __future__ import annotations

import os

from vmcell_protos.errors import CallerError

from .journal import Journal
from .loop import Loop
from .process import Process, ProcessConfig
from .spawn import Launch, SpawnError, spawn

# How long a client may still ask how a process ended.
REMEMBER_SECONDS = 30.0


class ProcessTable:
    """Live processes by pid; ended ones stay for REMEMBER_SECONDS, for Connect only."""

    def __init__(self, loop: Loop) -> None:
        self.journal = Journal()
        self._loop = loop
        self._live: dict[int, Process] = {}
        self._past: dict[int, Process] = {}
        # Not yet reaped; a live process whose child has ended may still be read from.
        self._running: dict[int, Process] = {}

    def start(self, launch: Launch, config: ProcessConfig) -> Process:
        """Raises SpawnError."""
        try:
            spawned = spawn(launch)
        except SpawnError as error:
            self.journal.refused(config.command, config.arguments, str(error))
            raise
        self.journal.started(spawned.pid, config.command, config.arguments)
        process = Process(
            self._loop,
            spawned,
            config,
            terminal=launch.terminal is not None,
            ended=self._ended,
            journal=self.journal,
        )
        self._past.pop(process.pid, None)
        self._live[process.pid] = process
        self._running[process.pid] = process
        return process

    def live(self) -> list[Process]:
        return list(self._live.values())

    def find(self, *, pid: int | None, tag: str | None, ended: bool = False) -> Process:
        """By pid or tag; with `ended` also one that ended lately. CallerError not_found."""
        tables = (self._live, self._past) if ended else (self._live,)
        for table in tables:
            for process in table.values():
                if process.pid == pid or (tag is not None and process.config.tag == tag):
                    return process
        what = f"process with pid {pid}" if tag is None else f"process with tag {tag}"
        raise CallerError(f"{what} not found", code="not_found")

    def reap(self) -> None:
        """Take every ended child: the started ones, and orphans, which pid 1 inherits."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._running.pop(pid, None)
            if process is not None:
                process.reaped(wait_status)

    def _ended(self, process: Process) -> None:
        if self._live.get(process.pid) is process:
            del self._live[process.pid]
        self._past[process.pid] = process
        self._loop.after(REMEMBER_SECONDS, lambda: self._forget(process))

    def _forget(self, process: Process) -> None:
        if self._past.get(process.pid) is process:
            del self._past[process.pid]
