"""The files of one container as the host sees them: copied in at the start, again, and read.

All of it happens in children: the init copies at its start and sends its mount namespace back; that
stays open until the container is removed, so what an ended program has left can still be read.
"""

from __future__ import annotations

import os

from vmcell_agent import copyin
from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.errand import Errands
    from vmcell_agent.renewal import Renewal
    from vmcell_agent.report import Report

    Done = Callable[[VmcellError | None], None]

DEADLINE_SECONDS = 10.0
MAX_WAITING = 64


class ContainerFiles:
    """Owns the descriptor of the container's mount namespace; `close` is idempotent."""

    def __init__(self, errands: Errands, name: str, files: list[FileCopy]) -> None:
        """`files` are what the start is to copy in; raises CallerError for what cannot be."""
        copyin.check(files)
        self._errands = errands
        self.name = name
        self._waiting: list[FileCopy] | None = files  # None: they have been handed to the init
        # What CreateContainer has made, without content, and where that is not as asked.
        self._copies: list[FileCopy] = []
        self._targets: dict[str, str] = {}
        self.namespace = -1  # a descriptor, from the start on
        self._queue: list[tuple[list[Renewal], Done]] = []  # the first one is being written

    def take(self) -> list[FileCopy]:
        """What the init is to copy; called once. Nothing is kept: secrets may be among them."""
        files, self._waiting = self._waiting or [], None
        self._copies = [
            FileCopy(destination=f.destination, directory=f.directory, read_only=f.read_only)
            for f in files
        ]
        return files

    def told(self, report: Report) -> None:
        """Where the init has put a file, and its mount namespace once all of them are there."""
        if report.kind == "T":
            self._targets[self._copies[report.number].destination] = report.path
        elif report.kind == "N":
            self.namespace = report.descriptor

    def copy_again(self, files: list[FileCopy], answer: Done) -> None:
        """Write files where they were copied to, or change what is still to be copied; raises
        CallerError."""
        from vmcell_agent import renewal  # boot does not need it

        copyin.check(files)
        if self._waiting is not None:
            renewal.plan(self._waiting, {}, files)
            self._waiting = renewal.merge(self._waiting, files)
            answer(None)
            return
        self._check_namespace()
        if len(self._queue) >= MAX_WAITING:
            raise CallerError(
                f"{self.name} has {MAX_WAITING} copies under way", code="resource_exhausted"
            )
        self._queue.append((renewal.plan(self._copies, self._targets, files), answer))
        if len(self._queue) == 1:
            self._write_first()

    def _write_first(self) -> None:
        """One after the other: the last call's content is the one that stays."""
        from vmcell_agent import renewal

        renewals, answer = self._queue[0]
        namespace = self.namespace

        def done(result: bytes | VmcellError) -> None:
            self._queue.pop(0)
            if self._queue:
                self._write_first()
            answer(result if isinstance(result, VmcellError) else None)

        try:
            self._errands.run(
                f"copy files into {self.name} again",
                lambda: renewal.write(namespace, renewals),
                done,
                seconds=DEADLINE_SECONDS,
                keep=(namespace,),
            )
        except VmcellError as error:
            done(error)

    def read(
        self,
        path: str,
        limit_bytes: int,
        answer: Callable[[tuple[int, bytes] | VmcellError], None],
    ) -> None:
        """Answers with a file's mode and content; raises CallerError."""
        from vmcell_agent import readout  # boot does not need it

        readout.check(path, limit_bytes)
        self._check_namespace()
        namespace = self.namespace

        def done(result: bytes | VmcellError) -> None:
            answer(result if isinstance(result, VmcellError) else readout.unpack(result))

        self._errands.run(
            f"read {path[:160]} of {self.name}",
            lambda: readout.read(namespace, path, limit_bytes),
            done,
            seconds=DEADLINE_SECONDS,
            keep=(namespace,),
            most_bytes=limit_bytes + readout.HEADER_BYTES,
        )

    def _check_namespace(self) -> None:
        if self.namespace < 0:
            raise CallerError(
                f"{self.name} has no files yet; start it first", code="failed_precondition"
            )

    def close(self) -> None:
        waiting, self._queue = self._queue[1:], self._queue[:1]
        for _, answer in waiting:
            answer(CallerError(f"{self.name} was removed", code="not_found"))
        if self.namespace >= 0:
            os.close(self.namespace)
            self.namespace = -1
