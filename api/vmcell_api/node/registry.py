"""The sandboxes that noded knows of, each with a lock and a deadline.

Whoever holds a sandbox's lock builds, saves, restores or removes it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vmcell_api.node.build import MachineLife
from vmcell_api.node.deadlines import Deadlines
from vmcell_api.node.sandbox import Sandbox
from vmcell_protos.errors import CallerError


@dataclass
class Entry:
    """A place in the registry; `sandbox` is None until it is built.

    `life` is that of its present task, whose `died` is set without the lock: it ends a build that
    waits for the guest. The end of one of `past_pids` is old news. `wanted` counts those who wait
    for the lock to resume it; they call a pause off. `stuck` is the slot of a machine that was to
    end and has not, `mislabelled`: the labels of a paused one may say that it runs.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    sandbox: Sandbox | None = None
    ended: bool = False
    life: MachineLife = field(default_factory=MachineLife)
    past_pids: set[int] = field(default_factory=set)
    wanted: int = 0
    stuck: int | None = None
    mislabelled: bool = False
    due_monotonic_s: float = 0.0


class Registry:
    """Thread-safe. `expired(sandbox_id)` is called from a thread of its own, once per deadline."""

    def __init__(self, expired: Callable[[str], None]) -> None:
        self._entries: dict[str, Entry] = {}
        # Containers that are not named as their sandbox.
        self._containers: dict[str, str] = {}
        self._lock = threading.Lock()
        self._deadlines = Deadlines(expired)

    def start(self) -> None:
        """Starts the thread."""
        self._deadlines.start()

    def stop(self) -> None:
        """Ends it; deadlines that have not come stay unserved."""
        self._deadlines.stop()

    def sandboxes(self) -> list[Sandbox]:
        """Those that are built, oldest first."""
        with self._lock:
            found = [entry.sandbox for entry in self._entries.values() if entry.sandbox]
        return sorted(found, key=lambda sandbox: (sandbox.started_at_unix_ms, sandbox.sandbox_id))

    def entry(self, sandbox_id: str) -> Entry:
        """The place of a sandbox; CallerError not_found."""
        with self._lock:
            entry = self._entries.get(sandbox_id)
        if entry is None:
            raise not_found(sandbox_id)
        return entry

    def sandbox_of(self, container_id: str) -> str:
        """The id of the sandbox that a container is of."""
        with self._lock:
            return self._containers.get(container_id, container_id)

    def adopt(self, sandbox: Sandbox, *, stuck: int | None = None) -> Entry:
        """A sandbox that an earlier noded has made."""
        entry = Entry(sandbox=sandbox, stuck=stuck)
        with self._lock:
            self._entries[sandbox.sandbox_id] = entry
        self.note_container(sandbox)
        return entry

    def note_container(self, sandbox: Sandbox) -> None:
        """Lets `sandbox_of` know the container of a sandbox."""
        if sandbox.container != sandbox.sandbox_id:
            with self._lock:
                self._containers[sandbox.container] = sandbox.sandbox_id

    def forget_container(self, container_id: str) -> None:
        """The container is gone."""
        with self._lock:
            self._containers.pop(container_id, None)

    @contextlib.contextmanager
    def new(self, sandbox_id: str) -> Iterator[Entry]:
        """A locked new place; it is forgotten again when the block fails."""
        entry = Entry()
        with entry.lock:
            with self._lock:
                if sandbox_id in self._entries:
                    raise CallerError(f"sandbox {sandbox_id} exists already", code="already_exists")
                self._entries[sandbox_id] = entry
            try:
                yield entry
            except BaseException:
                self.forget(sandbox_id, entry)
                raise

    @contextlib.contextmanager
    def locked(self, sandbox_id: str, *, state: str = "") -> Iterator[tuple[Entry, Sandbox]]:
        """The place, locked, with its sandbox; CallerError not_found, aborted: in another state."""
        entry = self.entry(sandbox_id)
        with entry.lock:
            if entry.ended or entry.sandbox is None:
                raise not_found(sandbox_id)
            if state and entry.sandbox.state != state:
                raise CallerError(
                    f"sandbox {sandbox_id} is {entry.sandbox.state}, not {state}", code="aborted"
                )
            yield entry, entry.sandbox

    @contextlib.contextmanager
    def wanted(self, sandbox_id: str, *, by_request: bool) -> Iterator[tuple[Entry, Sandbox]]:
        """As `locked`, and whoever pauses the sandbox is told meanwhile that it is wanted.

        `by_request`: of the sandbox's ports; CallerError failed_precondition for a sandbox that
        does not run and that requests do not wake.
        """
        entry = self.entry(sandbox_id)
        with self._lock:
            _check_wakes(sandbox_id, entry, by_request)
            entry.wanted += 1
        try:
            entry.lock.acquire()
        finally:
            with self._lock:
                entry.wanted -= 1
        try:
            if entry.ended or entry.sandbox is None:
                raise not_found(sandbox_id)
            _check_wakes(sandbox_id, entry, by_request)
            yield entry, entry.sandbox
        finally:
            entry.lock.release()

    def forget(self, sandbox_id: str, entry: Entry) -> None:
        """The sandbox has ended; its lock is held."""
        entry.ended = True
        self._deadlines.cancel(sandbox_id)
        with self._lock:
            self._entries.pop(sandbox_id, None)

    def set_due(self, entry: Entry, *, sandbox_id: str, left_ms: int) -> None:
        """Sets or moves the deadline to that long from now."""
        entry.due_monotonic_s = time.monotonic() + left_ms / 1000
        self._deadlines.set(sandbox_id, entry.due_monotonic_s)

    def cancel_due(self, sandbox_id: str) -> None:
        """The sandbox has no deadline any more."""
        self._deadlines.cancel(sandbox_id)


def _check_wakes(sandbox_id: str, entry: Entry, by_request: bool) -> None:
    sandbox = entry.sandbox
    if by_request and sandbox is not None and not sandbox.is_running and not sandbox.auto_resume:
        raise CallerError(f"sandbox {sandbox_id} is paused", code="failed_precondition")


def not_found(sandbox_id: str) -> CallerError:
    """What is said of a sandbox that is not here, or not any more."""
    return CallerError(f"sandbox {sandbox_id} was not found on this node", code="not_found")
